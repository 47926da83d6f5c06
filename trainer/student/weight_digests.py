"""Digests of a model's weights and buffers: what was trained, and whether a model made otherwise is the same.

A model that is made again, from its configuration and a checkpoint, can lack a weight or compute with another buffer
and look right all the same. So each tensor of the model in training is hashed where it is, whatever shares it out, and
all that is made of it later is compared by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from strategies.common.shards import Layout, local_of
from strategies.distillation.losses.features import NAME
from strategies.sharding.engine import Engine
from trainer.errors import RunFailed
from trainer.files import write_atomically
from trainer.run.folder import not_written, read_json

Digests = dict[str, str]
SENT = 2**24  # elements that one rank sends another at a time
BY_LENGTH = ("dynamic", "longrope")  # rotary frequencies that follow what was read last; `original_` ones do not


def digests_of(model: nn.Module) -> Digests:
    """SHA-256 of every parameter and buffer of a whole model, by name; of those that are shared, by each name."""
    found = {id(parameter): _digest(parameter, [local_of(parameter)]) for parameter in model.parameters()}
    return _by_name(model, found)


def digests_in_training(engine: Engine, device: torch.device) -> Digests:
    """The same of a student in an engine's hands, on the first rank; every rank takes part, and sends what it holds.

    Args:
        device: on which ranks exchange.
    """
    names = dict(engine.student.named_parameters())
    found = {}
    for tensor, layout in engine.tensors():
        flat = local_of(tensor)
        for piece, held in zip(layout.pieces, _held(layout), strict=True):
            parts = _parts(piece.of(flat), held, layout, device)
            found[id(names[piece.name])] = _digest(torch.empty(piece.shape, dtype=flat.dtype, device="meta"), parts)
    return _by_name(engine.student, found)


def check_digests(trained: Digests, model: nn.Module, what: str) -> None:
    """Compare a model with the digests of the one that was trained.

    Raises:
        RunFailed: they differ, with the name of the first weight that does.
    """
    if (name := first_difference(trained, digests_of(model))) is not None:
        raise RunFailed(_other(what, name))


def check_names(trained: Iterable[str], model: nn.Module, what: str) -> None:
    """Compare a model with the names of all weights that were trained, shared ones once; see `check_digests`."""
    there = {name: "" for name, _ in model.named_parameters()}
    if (name := first_difference({name: "" for name in trained if not _besides(name)}, there)) is not None:
        raise RunFailed(_other(what, name))


def first_difference(trained: Digests, other: Digests) -> str | None:
    """The first tensor that two models do not have in common, and how they differ in it."""
    for name in (*trained, *other):
        if trained.get(name) != other.get(name):
            return (f"{name} was trained, and is not there" if name not in other else
                    f"{name} is there, and was not trained" if name not in trained else
                    f"{name} has other values")
    return None


def save_digests(file: Path, digests: Digests) -> None:
    """Write them as JSON."""
    write_atomically(file, json.dumps({"sha256": digests}, indent=1) + "\n")


def read_digests(file: Path) -> Digests | None:
    """Those of a run; None of one that an earlier version trained.

    Raises:
        UserError: the file was edited.
    """
    if not file.exists():
        return None
    found = read_json(file).get("sha256")
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise not_written(file, "it has no digests by name")
    return found


# ---- helpers

def _other(what: str, how: str) -> str:
    return (f"{what} is not the model that was trained: {how}.\n  -> the training checkpoint is safe; if nobody edited "
            "config.json, please report this with it")


def _besides(name: str) -> bool:
    """Whether a weight helps in training and is no part of the student."""
    return name.startswith(f"{NAME}.")


def _by_name(model: nn.Module, found: dict[int, str]) -> Digests:
    named = {name: found[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not _follows_length(model, name):
            named[name] = _digest(buffer, [buffer.detach().contiguous().view(-1)])
    return {name: digest for name, digest in named.items() if not _besides(name)}


def _follows_length(model: nn.Module, name: str) -> bool:
    """Whether a buffer holds rotary frequencies that a forward of another length changes."""
    owner, _, own = name.rpartition(".")
    module, layer = model.get_submodule(owner), own.removesuffix("inv_freq").removesuffix("_")
    if not own.endswith("inv_freq") or own.endswith("original_inv_freq"):
        return False
    kind = getattr(module, "rope_type", None)
    return (kind.get(layer) if isinstance(kind, dict) else kind) in BY_LENGTH


def _digest(like: torch.Tensor, parts: Iterator[torch.Tensor] | list[torch.Tensor]) -> str:
    """SHA-256 of a tensor's dtype, shape and elements in row-major order, which come in parts."""
    digest = hashlib.sha256(f"{like.dtype} {tuple(like.shape)} ".encode())
    for part in parts:
        for piece in part.split(SENT) if part.numel() else ():
            digest.update(piece.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _held(layout: Layout) -> list[list[tuple[int, int]]]:
    """For each of a layout's pieces, what each rank holds of it: start and stop."""
    own = [(piece.start, piece.stop) for piece in layout.pieces]
    if layout.group is None:
        return [[part] for part in own]
    every: list[list[tuple[int, int]]] = [[]] * dist.get_world_size(layout.group)
    dist.all_gather_object(every, own, group=layout.group)
    return [list(parts) for parts in zip(*every, strict=True)]


def _parts(own: torch.Tensor, held: list[tuple[int, int]], layout: Layout, device: torch.device
           ) -> Iterator[torch.Tensor]:
    """A parameter's elements in order, on the first rank; the others send theirs, and get their own back."""
    if layout.group is None:
        yield own
        return
    rank = dist.get_rank(layout.group)
    first = dist.get_global_rank(layout.group, 0)
    for number, (start, stop) in sorted(enumerate(held), key=lambda one: one[1]):
        for begin in range(0, stop - start, SENT):
            count = min(SENT, stop - start - begin)
            if number == rank:
                part = own[begin:begin + count]
                if rank:
                    dist.send(part.to(device), first, group=layout.group)
                yield part
            elif rank == 0:
                part = torch.empty(count, dtype=own.dtype, device=device)
                dist.recv(part, dist.get_global_rank(layout.group, number), group=layout.group)
                yield part

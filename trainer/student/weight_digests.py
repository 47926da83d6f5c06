"""Hashes the weights and buffers of the trained model, and checks rebuilt models against the hashes.

A model rebuilt from its configuration and a checkpoint can lack a weight or have a different buffer and still look
right. So every tensor of the model in training is hashed where it is, even if it is sharded, and every model rebuilt
later is compared by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from strategies.common.frozen_base import base_names
from strategies.common.shards import Layout, local_of
from strategies.common.tensor_digest import tensor_digest
from strategies.distillation.losses.features import NAME
from strategies.pruning.early_exit.exit_heads import NAME as EXITS
from strategies.sharding.engine import Engine
from trainer.errors import RunFailed
from trainer.files import write_atomically
from trainer.run.folder import not_written, read_json

Digests = dict[str, str]
SENT = 2**24  # elements per message between ranks
# RoPE schemes whose frequency buffers depend on the last input. The `original_inv_freq` buffers do not.
BY_LENGTH = ("dynamic", "longrope")


def digests_of(model: nn.Module) -> Digests:
    """SHA-256 of every parameter and buffer of an unsharded model, by name; tied ones under each of their names."""
    found = {id(parameter): tensor_digest(parameter, [local_of(parameter)]) for parameter in model.parameters()}
    return _by_name(model, found)


def digests_in_training(engine: Engine, device: torch.device, frozen: Digests | None = None) -> Digests:
    """`digests_of` for a student held by an engine, sharded or not. A collective call; valid on the first rank only.

    Args:
        device: the device for communication between ranks.
        frozen: of a frozen base that the engine holds in other numbers, or shared out, those from before.
    """
    names = dict(engine.student.named_parameters())
    found = {id(names[name]): digest for name, digest in (frozen or {}).items()}
    for tensor, layout in engine.tensors():
        flat = local_of(tensor)
        for piece, held in zip(layout.pieces, _held(layout), strict=True):
            like = torch.empty(piece.shape, dtype=flat.dtype, device="meta")
            found[id(names[piece.name])] = tensor_digest(like, _parts(piece.of(flat), held, layout, device))
    return _by_name(engine.student, found)


def check_digests(trained: Digests, model: nn.Module, what: str) -> None:
    """Check a model against the digests of the trained one.

    Args:
        what: describes the model in the error message.

    Raises:
        RunFailed: they differ; the message names the first tensor that does.
    """
    if (name := first_difference(trained, digests_of(model))) is not None:
        raise RunFailed(_other(what, name))


def check_names(trained: Iterable[str], model: nn.Module, what: str) -> None:
    """Check that a model has exactly the weights that a checkpoint holds, by name; see `check_digests`.

    Args:
        trained: names of the trained weights; tied ones have one name.
    """
    base = base_names(model)
    there = {name: "" for name, _ in model.named_parameters() if name not in base}
    if (name := first_difference({name: "" for name in trained if not _besides(name)}, there)) is not None:
        raise RunFailed(_other(what, name))


def first_difference(trained: Digests, other: Digests) -> str | None:
    """The first tensor in which two models differ, and how, in words; None if there is none."""
    for name in (*trained, *other):
        if trained.get(name) != other.get(name):
            return (f"{name} was trained, and is not there" if name not in other else
                    f"{name} is there, and was not trained" if name not in trained else
                    f"{name} has other values")
    return None


def save_digests(file: Path, digests: Digests) -> None:
    """Write digests as JSON."""
    write_atomically(file, json.dumps({"sha256": digests}, indent=1) + "\n")


def read_digests(file: Path) -> Digests | None:
    """Read a run's digests; None if there is no file, because an earlier version trained the run.

    Raises:
        UserError: the file does not contain digests by name, so it was edited.
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
    """Whether a weight belongs to projections or exits, which are trained beside the student, and not to it."""
    return name.startswith((f"{NAME}.", f"{EXITS}."))


def _by_name(model: nn.Module, found: dict[int, str]) -> Digests:
    named = {name: found[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not _follows_length(model, name):
            named[name] = tensor_digest(buffer, [buffer.detach().contiguous().view(-1)])
    return {name: digest for name, digest in named.items() if not _besides(name)}


def _follows_length(model: nn.Module, name: str) -> bool:
    """Whether a buffer holds rotary frequencies that change with the length of the input."""
    owner, _, own = name.rpartition(".")
    module, layer = model.get_submodule(owner), own.removesuffix("inv_freq").removesuffix("_")
    if not own.endswith("inv_freq") or own.endswith("original_inv_freq"):
        return False
    kind = getattr(module, "rope_type", None)
    return (kind.get(layer) if isinstance(kind, dict) else kind) in BY_LENGTH


def _held(layout: Layout) -> list[list[tuple[int, int]]]:
    """For each piece of a layout, the range of elements (start, stop) that each rank holds."""
    own = [(piece.start, piece.stop) for piece in layout.pieces]
    if layout.group is None:
        return [[part] for part in own]
    every: list[list[tuple[int, int]]] = [[]] * dist.get_world_size(layout.group)
    dist.all_gather_object(every, own, group=layout.group)
    return [list(parts) for parts in zip(*every, strict=True)]


def _parts(own: torch.Tensor, held: list[tuple[int, int]], layout: Layout, device: torch.device
           ) -> Iterator[torch.Tensor]:
    """Yield a parameter's elements in order on the first rank. Other ranks send theirs to it, and yield only those."""
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

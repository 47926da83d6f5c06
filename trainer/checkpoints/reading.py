"""Loads checkpoints on any number of processes and under any engine, whatever wrote them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from strategies.common.frozen_base import base_names
from strategies.common.shards import Piece, local_of
from strategies.optimizers.optimizer_state import PieceState, write_state
from strategies.sharding.engine import Engine
from trainer.checkpoints.manifest import Unreadable, read_manifest
from trainer.checkpoints.random_state import set_random_state
from trainer.checkpoints.writing import RANDOM, SCORES, buffers_of


def load(checkpoint: Path, engine: Engine, rank: int) -> dict[str, Any]:
    """Restore weights, optimizer state and random state from a checkpoint, and return its plain state.

    Not a collective call, so that a process which fails can report it. Call `engine.refresh` afterwards. A process for
    which the checkpoint has no random state keeps its fresh one.

    Raises:
        Unreadable: the checkpoint is damaged, or belongs to another model.
    """
    with torch.no_grad(), _reading():
        state, saved = _opened(checkpoint)
        for tensor, layout in engine.saved():
            flat = local_of(tensor)
            for piece in layout.pieces:
                if piece.numel:
                    piece.of(flat).copy_(saved.read("model", piece.name, piece))
            moments = [saved.moments(piece) for piece in layout.pieces]
            for piece, own in zip(layout.pieces, moments, strict=True):
                _load_scores(engine, piece, own.elementwise.pop(SCORES, None))
            write_state(engine.inner, tensor, moments)
        _load_buffers(saved, engine.student)
        if RANDOM.format(rank) in state.pop("files"):
            set_random_state(load_file(checkpoint / RANDOM.format(rank)))
    return state


def load_whole(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into an unsharded model, whichever engine wrote them.

    The base beneath a model's adapters is in no checkpoint, and stays as it is.

    Raises:
        Unreadable: the checkpoint is damaged, or belongs to another model.
    """
    with torch.no_grad(), _reading():
        _, saved = _opened(checkpoint)
        base = base_names(model)
        for name, parameter in model.named_parameters():
            if name in base:
                continue
            whole = Piece(name, tuple(parameter.shape), 0, parameter.numel())
            local_of(parameter).copy_(saved.read("model", name, whole))
        _load_buffers(saved, model)


def names(checkpoint: Path) -> list[str]:
    """Names of all weights of a checkpoint; tied weights have one name.

    Raises:
        Unreadable: the checkpoint is damaged.
    """
    with _reading():
        return list(read_manifest(checkpoint)["shapes"])


class Saved:
    """The tensors of a checkpoint, from which parts can be read.

    Args:
        checkpoint: the checkpoint's folder.
        shapes: shapes of the unsharded parameters, by name.
        files: names of the files to read; by default all in the folder.
    """

    def __init__(self, checkpoint: Path, shapes: dict[str, list[int]], files: Iterable[str] | None = None) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._parts: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._states: dict[str, set[str]] = defaultdict(set)
        there = [file.name for file in checkpoint.glob("*.safetensors")] if files is None else files
        for file in sorted(there):
            kind = file.partition(".")[0].partition("-")[0]
            if kind in ("model", "optimizer"):
                self._enter(kind, safe_open(checkpoint / file, framework="pt"))

    def _enter(self, kind: str, handle: Any) -> None:
        for key in handle.keys():  # noqa: SIM118 - no dictionary
            name, _, start = key.partition("@")
            count = math.prod(handle.get_slice(key).get_shape())
            first = int(start or 0)
            self._parts[kind, name].append((first, first + count, handle, key))
            if kind == "optimizer":
                parameter, _, what = name.rpartition("/")
                self._states[parameter].add(what)

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a tensor. `kind` is `model` or `optimizer`."""
        return (kind, name) in self._parts

    def read(self, kind: str, name: str, piece: Piece) -> torch.Tensor:
        """The elements of a piece of a tensor, flat.

        Raises:
            Unreadable: the checkpoint lacks the tensor or some of its elements, or has it in another shape.
        """
        if self.shapes.get(piece.name, piece.shape) != piece.shape or not self.has(kind, name):
            raise Unreadable(f"it is of another model: {piece.name} has shape {piece.shape}, and there it has "
                             f"{self.shapes.get(piece.name, 'none')}")
        parts = [_elements(handle, key, max(0, piece.start - start), min(stop, piece.stop) - start)
                 for start, stop, handle, key in sorted(self._parts[kind, name], key=lambda part: part[0])
                 if start < piece.stop and stop > piece.start]
        if sum(part.numel() for part in parts) != piece.numel:
            raise Unreadable(f"it lacks a part of {name}")
        return torch.cat(parts)

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A tensor that was written in one part, in its own shape."""
        (_, _, handle, key), *_ = self._parts[kind, name]
        return handle.get_tensor(key)

    def moments(self, piece: Piece) -> PieceState:
        """The optimizer state of a piece of a parameter; empty if there is none."""
        elementwise, whole = {}, {}
        for what in sorted(self._states.get(piece.name, ())):
            if what.startswith("="):  # the same on all ranks
                whole[what[1:]] = self.whole("optimizer", f"{piece.name}/{what}")
            elif piece.numel:
                elementwise[what] = self.read("optimizer", f"{piece.name}/{what}", piece)
        return PieceState(elementwise, whole)


# ---- helpers

def _opened(checkpoint: Path) -> tuple[dict[str, Any], Saved]:
    """Plain state and tensors of a checkpoint, after checking that no file is missing or truncated."""
    state = read_manifest(checkpoint)
    return state, Saved(checkpoint, state.pop("shapes"), state["files"])


@contextmanager
def _reading() -> Iterator[None]:
    """Convert any error that damaged files may cause into `Unreadable`."""
    try:
        yield
    except Unreadable:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _elements(handle: Any, key: str, begin: int, end: int) -> torch.Tensor:
    """Elements `begin` to `end` of a saved tensor, flat; reads only the rows that contain them."""
    part = handle.get_slice(key)
    shape = part.get_shape()
    if not shape:
        return handle.get_tensor(key).reshape(1)
    row = math.prod(shape[1:])
    first = begin // row
    rows = part[first:-(-end // row)].reshape(-1)
    return rows[begin - first * row:end - first * row]


def _load_scores(engine: Engine, piece: Piece, found: torch.Tensor | None) -> None:
    own = None if engine.sparse is None else engine.sparse.scores(piece.name)
    if own is not None and found is not None:
        own.copy_(found.view(own.shape))


def _load_buffers(saved: Saved, model: nn.Module) -> None:
    for name, buffer in buffers_of(model).items():
        if saved.has("model", name):
            buffer.copy_(saved.whole("model", name))

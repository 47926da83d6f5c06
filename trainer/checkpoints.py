"""Checkpoints of a run: weights, optimizer, loss scale, random state and step, in safetensors and JSON.

Every process writes what it holds; any number of processes, under any engine, reads what it needs of that, in parts and
without ever holding more than a parameter. A checkpoint is written beside and renamed when all of it is on disk;
older ones are removed only then.

    model.safetensors       weights, fp32, by name; of a sharded student model-00000-of-00002.safetensors and so on,
                            with what each process holds of a weight, flat, as `name@start`
    optimizer.safetensors   its state: `name/exp_avg` like the weights, `name/=step` and the like the same everywhere
    random-0.safetensors    random state of process 0
    state.json              step, loss scale, shapes, and the files beside it with their bytes
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from strategies.memory.shards import Piece, local_of
from strategies.optimizers.state import PieceState, read_state, write_state
from strategies.sharding.engine import Engine

NAME = "step-{:08d}"
WHOLE, PART = "{}.safetensors", "{}-{:05d}-of-{:05d}.safetensors"


class Unreadable(ValueError):
    """A checkpoint that is damaged, or of another model."""


def save(folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int, rank: int, ranks: int,
         wait: Any) -> Path:
    """Write a checkpoint from all processes.

    Args:
        folder: the run's `checkpoints`.
        step: optimizer steps done.
        engine: what holds the student and its optimizer.
        state: what else the main process must remember, as plain data.
        keep: checkpoints to leave, this one included.
        rank: number of this process; each writes its own part and random state.
        ranks: number of processes.
        wait: a barrier over all processes.
    """
    final = folder / NAME.format(step)
    if final.exists():  # this step is saved; writing it again would only put it at risk
        return final
    partial = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    save_file(_random_state(), partial / f"random-{rank}.safetensors")
    weights, moments = _held(engine, rank)
    for kind, tensors in (("model", weights), ("optimizer", moments)):
        if tensors:
            file = partial / (PART.format(kind, rank, ranks) if engine.sharded else WHOLE.format(kind))
            save_file(tensors, file, metadata={"format": "pt"})
            _sync(file)
    wait()
    if rank == 0:
        shapes = {piece.name: piece.shape for _, layout in engine.tensors() for piece in layout.pieces}
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / "state.json").write_text(json.dumps({"step": step, **state, "shapes": shapes, "files": files},
                                                       indent=1))
        for file in [*partial.iterdir(), partial]:
            _sync(file)
        os.rename(partial, final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    wait()
    return final


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint."""
    return max(folder.glob("step-*"), default=None)


def load(checkpoint: Path, engine: Engine, rank: int) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random state back, and return its plain state.

    Nobody waits for another process in here, so that one which fails can say so; `engine.refresh` is to follow.
    A process that the checkpoint did not know keeps its fresh random state.

    Raises:
        Unreadable: the checkpoint is damaged, or of another model.
    """
    with torch.no_grad(), _reading():
        state, saved = _opened(checkpoint)
        for tensor, layout in engine.tensors():
            flat = local_of(tensor)
            for piece in layout.pieces:
                if piece.numel:
                    piece.of(flat).copy_(saved.read("model", piece.name, piece))
            write_state(engine.inner, tensor, [saved.moments(piece) for piece in layout.pieces])
        _load_buffers(saved, engine.student)
        random = checkpoint / f"random-{rank}.safetensors"
        if random.exists():
            _set_random_state(load_file(random))
    return state


def load_whole(checkpoint: Path, model: nn.Module) -> None:
    """Fill a whole model with a checkpoint's weights, whatever engine wrote it."""
    with torch.no_grad(), _reading():
        _, saved = _opened(checkpoint)
        for name, parameter in model.named_parameters():
            whole = Piece(name, tuple(parameter.shape), 0, parameter.numel())
            local_of(parameter).copy_(saved.read("model", name, whole))
        _load_buffers(saved, model)


def _opened(checkpoint: Path) -> tuple[dict[str, Any], Saved]:
    """Plain state and tensors of a checkpoint of which no file is missing or cut off."""
    state = json.loads((checkpoint / "state.json").read_text())
    for name, size in state.pop("files", {}).items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).exists() else None
        if found != size:
            raise Unreadable(f"{name} is missing" if found is None else f"{name} has {found:,} bytes of {size:,}")
    return state, Saved(checkpoint, state.pop("shapes"))


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever files that are no longer as they were written lead to is one thing to say."""
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{type(error).__name__}: {error}") from error


class Saved:
    """The tensors of a checkpoint, read in parts.

    Args:
        checkpoint: its folder.
        shapes: of whole parameters, by name.
    """

    def __init__(self, checkpoint: Path, shapes: dict[str, list[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._parts: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._states: dict[str, set[str]] = defaultdict(set)
        files = [file for kind in ("model", "optimizer") for file in sorted(checkpoint.glob(f"{kind}*.safetensors"))]
        for file in files:
            kind = file.stem.partition("-")[0]
            handle = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118 - no dictionary
                name, _, start = key.partition("@")
                count = math.prod(handle.get_slice(key).get_shape())
                first = int(start or 0)
                self._parts[kind, name].append((first, first + count, handle, key))
                if kind == "optimizer":
                    parameter, _, what = name.rpartition("/")
                    self._states[parameter].add(what)

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a tensor."""
        return (kind, name) in self._parts

    def read(self, kind: str, name: str, piece: Piece) -> torch.Tensor:
        """Elements of a piece, flat.

        Raises:
            Unreadable: the checkpoint has no such tensor, another shape of it, or not all of its elements.
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
        """A tensor that was written whole, in its own shape."""
        (_, _, handle, key), *_ = self._parts[kind, name]
        return handle.get_tensor(key)

    def moments(self, piece: Piece) -> PieceState:
        """Optimizer state of a piece; empty where there is none."""
        elementwise, whole = {}, {}
        for what in sorted(self._states.get(piece.name, ())):
            if what.startswith("="):  # the same on all ranks
                whole[what[1:]] = self.whole("optimizer", f"{piece.name}/{what}")
            elif piece.numel:
                elementwise[what] = self.read("optimizer", f"{piece.name}/{what}", piece)
        return PieceState(elementwise, whole)


def _held(engine: Engine, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What this process writes: weights, and optimizer state. What all hold alike is written by the first."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for tensor, layout in engine.tensors():
        whole = layout.group is None
        if whole and rank:
            continue
        flat = local_of(tensor)
        for piece, state in zip(layout.pieces, read_state(engine.inner, tensor), strict=True):
            if rank == 0:
                moments |= {f"{piece.name}/={what}": value.cpu() for what, value in state.whole.items()}
            if not piece.numel:
                continue
            weights[_key(piece.name, piece, whole)] = _shaped(piece.of(flat), piece, whole)
            moments |= {_key(f"{piece.name}/{what}", piece, whole): _shaped(value, piece, whole)
                        for what, value in state.elementwise.items()}
    if rank == 0:
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in _buffers(engine.student).items()}
    return weights, moments


def _key(name: str, piece: Piece, whole: bool) -> str:
    return name if whole else f"{name}@{piece.start}"


def _shaped(flat: torch.Tensor, piece: Piece, whole: bool) -> torch.Tensor:
    return flat.cpu().view(piece.shape if whole else (-1,))


def _elements(handle: Any, key: str, begin: int, end: int) -> torch.Tensor:
    """Elements `begin` to `end` of a saved tensor, flat; no more rows are read than they are in."""
    part = handle.get_slice(key)
    shape = part.get_shape()
    if not shape:
        return handle.get_tensor(key).reshape(1)
    row = math.prod(shape[1:])
    first = begin // row
    rows = part[first:-(-end // row)].reshape(-1)
    return rows[begin - first * row:end - first * row]


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to a model's state."""
    names = set(model.state_dict(keep_vars=True)) if any(True for _ in model.buffers()) else set()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _load_buffers(saved: Saved, model: nn.Module) -> None:
    for name, buffer in _buffers(model).items():
        if saved.has("model", name):
            buffer.copy_(saved.whole("model", name))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

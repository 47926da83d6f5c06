"""Writes a process's files of a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from strategies.common.shards import Piece, local_of
from strategies.optimizers.optimizer_state import read_state
from strategies.sharding.engine import Engine
from trainer.checkpoints.random_state import random_state

SCORES = "pruning_scores"  # the key of an element's score in pruning, beside the moments of the optimizer
WHOLE, PART, RANDOM = "{}.safetensors", "{}-{:05d}-of-{:05d}.safetensors", "random-{}.safetensors"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
           torch.bool: "BOOL"}


class Draft:
    """The layout of a safetensors file (format 0.x: eight bytes, a JSON header, the data) whose data is still to come.

    The library's own `save_file` would need all tensors at once, and so a copy of the whole optimizer state.

    Attributes:
        name: name of the file.
        bytes: size of the whole file.
        header: the bytes before the data.
        begins: offset of each tensor in the file.
    """

    def __init__(self, name: str, tensors: dict[str, tuple[torch.dtype, torch.Size]]) -> None:
        self.name, offset = name, 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets = {}
        # Wide elements first, so that every tensor is aligned to its element size when the file is memory-mapped.
        for key, (dtype, shape) in sorted(tensors.items(), key=lambda one: -one[1][0].itemsize):
            offsets[key], size = offset, shape.numel() * dtype.itemsize
            header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.begins = {key: len(self.header) + begin for key, begin in offsets.items()}
        self.bytes = len(self.header) + offset


def drafts(engine: Engine, rank: int, ranks: int) -> dict[str, Draft]:
    """Lay out the files that this process will write: random state, and its part of model and optimizer state."""
    tensors: dict[str, dict[str, tuple[torch.dtype, torch.Size]]] = defaultdict(dict)
    for kind, key, tensor in _contents(engine, rank):
        assert key not in tensors[kind], f"{key} would be written twice"
        tensors[kind][key] = tensor.dtype, tensor.shape
    names = {kind: PART.format(kind, rank, ranks) if engine.sharded else WHOLE.format(kind)
             for kind in ("model", "optimizer")}
    return {kind: Draft({**names, "random": RANDOM.format(rank)}[kind], found) for kind, found in tensors.items()}


def write(folder: Path, files: dict[str, Draft], engine: Engine, rank: int) -> None:
    """Write the files laid out by `drafts` into a folder, without syncing them.

    Raises:
        OSError: they cannot be written, for example because the disk is full.
    """
    with ExitStack() as stack:
        handles = {kind: stack.enter_context((folder / draft.name).open("wb")) for kind, draft in files.items()}
        for kind, draft in files.items():
            handles[kind].write(draft.header)
        for kind, key, tensor in _contents(engine, rank):
            handles[kind].seek(files[kind].begins[key])
            handles[kind].write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def shapes_of(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Shapes of the unsharded parameters, by name."""
    return {piece.name: piece.shape for _, layout in engine.saved() for piece in layout.pieces}


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers of a model, by name."""
    names = set(model.state_dict(keep_vars=True)) if any(True for _ in model.buffers()) else set()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _contents(engine: Engine, rank: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """File kind, key and tensor of everything that this process writes; the first one writes what is replicated."""
    yield from (("random", name, tensor) for name, tensor in random_state().items())
    for tensor, layout in engine.saved():
        whole = layout.group is None
        if whole and rank:
            continue
        flat = local_of(tensor)
        for piece, state in zip(layout.pieces, read_state(engine.inner, tensor), strict=True):
            if rank == 0:
                yield from (("optimizer", f"{piece.name}/={what}", value) for what, value in state.whole.items())
            if not piece.numel:
                continue
            yield "model", _key(piece.name, piece, whole), _shaped(piece.of(flat), piece, whole)
            for what, value in {**state.elementwise, **_beside(engine, piece)}.items():
                yield "optimizer", _key(f"{piece.name}/{what}", piece, whole), _shaped(value, piece, whole)
    if rank == 0:
        yield from (("model", name, buffer.detach()) for name, buffer in buffers_of(engine.student).items())


def _beside(engine: Engine, piece: Piece) -> dict[str, torch.Tensor]:
    """What is kept of a piece besides the optimizer's state, flat: the scores of pruning in training."""
    scores = None if engine.sparse is None else engine.sparse.scores(piece.name)
    return {} if scores is None else {SCORES: scores.reshape(-1)}


def _key(name: str, piece: Piece, whole: bool) -> str:
    return name if whole else f"{name}@{piece.start}"


def _shaped(flat: torch.Tensor, piece: Piece, whole: bool) -> torch.Tensor:
    return flat.view(piece.shape if whole else (-1,))

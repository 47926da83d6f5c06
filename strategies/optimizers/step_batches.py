"""Parts of parameters that a step updates together: enough for few kernels, few enough for caches and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

CACHED = 1 << 18
"""Elements of a batch on CPU, 1 MiB in fp32: what was just computed is still in the second cache."""
ALIGNED = 16
"""Elements, 64 bytes in fp32: parts of a buffer begin at multiples of them, as tensors of their own do."""


class Part(Protocol):
    """A rank's elements of one parameter, flat, and the settings of its group of parameters.

    Attributes:
        compiled: whether passes that keep nothing step it.
    """

    weight: torch.Tensor
    settings: dict[str, Any]
    group: Any
    compiled: bool


P = TypeVar("P", bound=Part)


def batches(parts: Iterable[P], largest: int) -> Iterator[list[P]]:
    """Runs of parts of one dtype, device, group of ranks and settings, one after another.

    Args:
        parts: consumed only as batches are.
        largest: number of elements of the largest part, which no batch exceeds, nor `CACHED` on CPU; a part larger than
            that is alone. Batches of compiled parts have no bound.
    """
    batch: list[P] = []
    room: float = 0
    for part in parts:
        if batch and (part.weight.numel() > room or not _alike(part, batch[0])):
            yield batch
            batch = []
        if not batch:
            room = (math.inf if part.compiled else min(largest, CACHED) if part.weight.device.type == "cpu"
                    else largest)
        batch.append(part)
        room -= part.weight.numel()
    if batch:
        yield batch


def _alike(part: Part, other: Part) -> bool:
    return (part.settings is other.settings and part.group is other.group and part.compiled == other.compiled
            and part.weight.dtype == other.weight.dtype and part.weight.device == other.weight.device)


def zeros_for(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat zeros as large as each weight, views of one new tensor."""
    sizes = [-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights]
    together = weights[0].new_zeros(sum(sizes)).split(sizes)
    return [own if own.numel() == weight.numel() else own[:weight.numel()]
            for own, weight in zip(together, weights, strict=True)]


def chunks(flat: torch.Tensor) -> list[slice]:
    """Slices of a flat tensor that are worked on one after another: all of it, on CPU `CACHED` elements at a time."""
    size = flat.numel()
    length = min(size, CACHED) if flat.device.type == "cpu" else size
    return [slice(begin, min(begin + length, size)) for begin in range(0, size, max(1, length))]

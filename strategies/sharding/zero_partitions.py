"""How ZeRO partitions the parameters of a group over ranks, following DeepSpeed's code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

ALIGNED = 2  # ZeRO pads a group of parameters to a multiple of this many elements times the number of ranks


def cuts(group: Sequence[torch.Tensor], stage: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """(start, stop) elements of each parameter of a group that a rank holds under ZeRO."""
    if stage == 3:
        parts = [equal_part(parameter, ranks) for parameter in group]
        return [(min(rank * part, parameter.numel()), min((rank + 1) * part, parameter.numel()))
                for parameter, part in zip(group, parts, strict=True)]
    size, offset, found = aligned(group, ranks) // ranks, 0, []
    for parameter in group:
        count, begin = parameter.numel(), rank * size - offset
        found.append((min(max(begin, 0), count), min(max(begin + size, 0), count)))
        offset += count
    return found


def aligned(parameters: Iterable[torch.Tensor], ranks: int) -> int:
    """Elements of a group of parameters, padded as in ZeRO's stages 1 and 2."""
    unit = ALIGNED * ranks
    return -(-sum(parameter.numel() for parameter in parameters) // unit) * unit


def equal_part(parameter: torch.Tensor, ranks: int) -> int:
    """Elements of a parameter that a rank holds, padding included, in the equal flat parts of ZeRO's stage 3."""
    return -(-parameter.numel() // ranks)

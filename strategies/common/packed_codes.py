"""Small whole numbers, several of them to a byte."""

from __future__ import annotations

import torch

WIDTHS = (2, 4, 8)  # bits that a number takes here


def width_of(bits: int) -> int:
    """Bits that numbers of this many bits take when they are packed: the next of `WIDTHS`."""
    return next(width for width in WIDTHS if width >= bits)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, columns) numbers from 0 to 2^width - 1, uint8, as (rows, bytes); a row ends with a whole byte."""
    each = 8 // width
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << width * place
    return packed


def unpack(packed: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """The numbers (rows, columns), uint8, that `pack` was given."""
    if width == 8:
        return packed
    parts = [(packed >> shift) & (2 ** width - 1) for shift in range(0, 8, width)]
    return torch.stack(parts, -1).flatten(1)[:, :columns]

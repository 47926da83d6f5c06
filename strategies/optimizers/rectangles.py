"""Split a contiguous run of a matrix's elements into rectangles: a rank's part may begin and end within a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from strategies.common.shards import Piece


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a stack of matrices [L, R, C] whose elements are contiguous.

    Attributes:
        begin: offset of its elements in the rank's piece.
        matrices, rows, columns: slices of the whole stack.
    """

    begin: int
    matrices: slice
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of matrices, rows and columns."""
        return (self.matrices.stop - self.matrices.start, self.rows.stop - self.rows.start,
                self.columns.stop - self.columns.start)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """[matrices, rows, columns]: view of the rectangle in the rank's piece."""
        return flat[self.begin:self.begin + math.prod(self.shape)].view(self.shape)


def stack_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(L, R, C) of a parameter with two dimensions or more: matrices over its last two, one for each leading index."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def blocks_of(piece: Piece) -> list[Rectangle]:
    """At most five rectangles: rest of a row, rest of a matrix, whole matrices, rows of the next, start of a row."""
    _, rows, columns = stack_of(piece.shape)
    found, at = [], piece.start
    while at < piece.stop:
        matrix, within = divmod(at, rows * columns)
        row, column = divmod(within, columns)
        left, size = piece.stop - at, [1, 1, columns]
        if column or left < columns:
            size[2] = min(columns - column, left)
        elif row or left < rows * columns:
            size[1] = min(rows - row, left // columns)
        else:
            size[0], size[1] = left // (rows * columns), rows
        first = (matrix, row, column)
        found.append(Rectangle(at - piece.start, *(slice(a, a + b) for a, b in zip(first, size, strict=True))))
        at += math.prod(size)
    return found

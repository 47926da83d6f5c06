"""Adafactor's compiled passes: one call for all whole parameters, and one for all rectangles of a sharded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from strategies.common.shards import Layout, Piece, local, local_of
from strategies.optimizers import passes
from strategies.optimizers.passes import number_of, row_spans, spread, without_data
from strategies.optimizers.rectangles import blocks_of, stack_of

Array = np.ndarray[Any, Any]


class Whole(NamedTuple):
    """Whole parameters to be stepped together: `table` and `scalars` of `kernels.adafactor_step`."""

    table: list[tuple[int, ...]]
    scalars: list[tuple[float, ...]]


def add_whole(whole: Whole, tensor: torch.Tensor, state: dict[str, torch.Tensor], layout: Layout,
              settings: dict[str, Any]) -> None:
    """Add the pieces of a tensor whose step has been counted."""
    weight = local_of(tensor)
    if without_data(weight):
        return
    step, own = number_of(state["step"]), scalars_of(settings, weight.dtype)
    row = (step ** settings["beta2_decay"], min(step ** -0.5, float(settings["lr"])), *own)
    addresses = [weight.data_ptr(), local(tensor.grad).data_ptr()]
    at = {name: state[name].data_ptr() if name in state else 0 for name in ("row_var", "col_var", "variance")}
    for piece in layout.pieces:
        begins = [address + 4 * piece.offset for address in addresses]
        if len(piece.shape) > 1:
            stack, rows, columns = stack_of(piece.shape)
            whole.table.append((*begins, at["row_var"], at["col_var"], stack, rows, columns))
            at["row_var"] += 4 * stack * rows
            at["col_var"] += 4 * stack * columns
        else:
            whole.table.append((*begins, 0, at["variance"], 1, 1, piece.numel))
            at["variance"] += 4 * piece.numel
        whole.scalars.append(row)


def scalars_of(settings: dict[str, Any], dtype: torch.dtype) -> tuple[float, float, float, float]:
    """eps[0], eps[1], d, and what weight decay leaves of the weight."""
    smallest = settings["eps"][0]
    return (torch.finfo(dtype).eps if smallest is None else smallest, settings["eps"][1], settings["d"],
            1 - float(settings["lr"]) * settings["weight_decay"])


def step_whole(whole: Whole) -> None:
    """Step what was added."""
    if whole.table:
        from strategies.optimizers.kernels import adafactor_step

        table, scalars = np.array(whole.table, dtype=np.int64), np.array(whole.scalars)
        spread(lambda run: adafactor_step(table[run], scalars[run]), table[:, 4:].prod(1))


# ---- rectangles of parameters [L, R, C], of which a rank has elements

class Spans:
    """Rows of the kernels that pass over rectangles, each a span of one: at most `SPAN` elements, or one row.

    What the addresses belong to has to be kept by whoever adds it.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int, int, int, int]] = []  # L, R, C of the span, R and C of the whole matrix
        self.blocks: list[int] = []  # of each span, the number of its rectangle
        self.owners: list[int] = []  # of each rectangle
        self._rows: list[tuple[int, ...]] = []

    def add(self, piece: Piece, weight: torch.Tensor, gradient: torch.Tensor, row: torch.Tensor,
            column: torch.Tensor, owner: int = 0) -> None:
        """Add a piece's rectangles: flat weight and gradient, numbers of rows [L, R] and of columns [L, C].

        Of the elements of all four that a span has, each follows the one before: it is of whole matrices, of whole
        rows of one, or of one row.
        """
        one, two, three, four = (0,) * 4 if without_data(weight) else (
            weight.data_ptr(), gradient.data_ptr(), row.data_ptr(), column.data_ptr())
        before = len(self.owners)
        for block, begin, top, left, sizes in _spans_of(piece, passes.SPAN):
            self._rows.append((one + begin, two + begin, three + top, four + left, *sizes[:3]))
            self.sizes.append(sizes)
            self.blocks.append(before + block)
            if before + block == len(self.owners):
                self.owners.append(owner)

    @property
    def table(self) -> Array:
        """int64 [k, 7]: addresses of weight, gradient, numbers of rows and of columns, and L, R, C."""
        return np.array(self._rows, dtype=np.int64).reshape(-1, 7)

    def begins(self) -> tuple[Array, int]:
        """int64 [k, 2]: where in one scratch each span's numbers of rows and of columns begin; the scratch's length."""
        counts = np.array([(matrices * rows, matrices * columns) for matrices, rows, columns, *_ in self.sizes],
                          dtype=np.int64).reshape(-1)
        ends = np.cumsum(counts)
        return (ends - counts).reshape(-1, 2), int(counts.sum())


def add_squares(spans: Spans, like: torch.Tensor) -> None:
    """Add what a rank has of means of squares over columns and over rows to the fp32 numbers of rows and columns.

    Each rectangle's sums are taken in float64, span by span in order, and rounded once.
    """
    begins, count = spans.begins()
    sums = like.new_zeros(count, dtype=torch.float64)
    if spans.sizes and not without_data(like):
        from strategies.optimizers.kernels import adafactor_add_means, adafactor_sums

        table, scratch, sizes = spans.table, sums.numpy(), np.array(spans.sizes, dtype=np.int64)
        spread(lambda run: adafactor_sums(table[run], begins[run], scratch), table[:, 4:].prod(1))
        adafactor_add_means(table, begins, sizes, np.array(spans.blocks, dtype=np.int64), scratch)


def norms_of(spans: Spans, owners: int, eps: float) -> torch.Tensor:
    """[owners, 2]: squared norms of weights and updates, whose V is the product of numbers of row and column."""
    found = torch.zeros(owners, 2, dtype=torch.float64)
    table = spans.table
    if len(table) and table[0, 0]:
        from strategies.optimizers.kernels import adafactor_norms_of

        norms, of_blocks = np.empty((len(table), 2)), np.zeros((len(spans.owners), 2))
        spread(lambda run: adafactor_norms_of(table[run], eps, norms[run]), table[:, 4:].prod(1))
        np.add.at(of_blocks, spans.blocks, norms)  # one after another, in order
        np.add.at(found.numpy(), spans.owners, of_blocks)
    return found


def apply(spans: Spans, rates: Sequence[float], eps: float, keep: float) -> None:
    """weight = keep weight - rate update, as in `norms_of`; rates: of each owner."""
    table = spans.table
    if len(table) and table[0, 0]:
        from strategies.optimizers.kernels import adafactor_apply_to

        factors = np.array([rates[spans.owners[block]] for block in spans.blocks])
        spread(lambda run: adafactor_apply_to(table[run], eps, keep, factors[run]), table[:, 4:].prod(1))


def shares_of(rows: Sequence[torch.Tensor], eps: float) -> list[torch.Tensor]:
    """Of each [L, R]: row means over the larger of their own mean and eps."""
    if not rows:
        return []
    sizes = [row.numel() for row in rows]
    together = rows[0].new_empty(sum(sizes))
    if not without_data(together):
        from strategies.optimizers.kernels import row_shares_of

        row_shares_of(np.array([(row.data_ptr(), *row.shape) for row in rows], dtype=np.int64), together.numpy(), eps)
    return [share.view(row.shape) for share, row in zip(together.split(sizes), rows, strict=True)]


@lru_cache(maxsize=1 << 16)
def _spans_of(piece: Piece, most: int) -> list[tuple[int, int, int, int, tuple[int, int, int, int, int]]]:
    """Of each span: its rectangle, bytes before it in elements, numbers of rows and of columns, and `Spans.sizes`.

    Args:
        most: elements of a span.
    """
    if len(piece.shape) < 2:  # one row, of which a rank has the numbers of its own columns
        return [(0, 0, 0, 0, (1, 1, piece.numel, 1, piece.numel))] if piece.numel else []
    _, rows, columns = stack_of(piece.shape)
    found = []
    for number, block in enumerate(blocks_of(piece)):
        _, height, width = block.shape
        for span in row_spans(*block.shape, most):
            matrix, top = block.matrices.start + span.matrices.start, block.rows.start + span.rows.start
            begin = block.begin + (span.matrices.start * height + span.rows.start) * width
            size = span.matrices.stop - span.matrices.start, span.rows.stop - span.rows.start, width
            found.append((number, 4 * begin, 4 * (matrix * rows + top), 4 * (matrix * columns + block.columns.start),
                          (*size, rows, columns)))
    return found

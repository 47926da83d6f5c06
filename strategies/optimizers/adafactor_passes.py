"""Adafactor's compiled passes: over whole parameters in one call, over large or sharded ones rectangle by rectangle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from strategies.common.shards import Layout, local, local_of
from strategies.optimizers.passes import RowSpan, added, number_of, row_spans, spread, spread_each, without_data
from strategies.optimizers.rectangles import stack_of

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


# ---- rectangles of a parameter [L, R, C], of which a rank has elements

def sums_of(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 sums of squares over columns [L, R] and over rows [L, C] of fp32 [L, R, C]."""
    stack, rows, columns = gradient.shape
    parts = row_spans(stack, rows, columns)
    over_columns = gradient.new_zeros(stack, rows, dtype=torch.float64)
    over_rows = gradient.new_zeros(max((part.number for part in parts), default=0) + 1, stack, columns,
                                   dtype=torch.float64)  # of each of a matrix's spans, added in their order
    if not without_data(gradient):
        from strategies.optimizers.kernels import add_squares

        values, left, down = gradient.numpy(), over_columns.numpy(), over_rows.numpy()
        spread_each(lambda part: add_squares(values[part.matrices, part.rows], left[part.matrices, part.rows],
                                             down[part.number, part.matrices]), parts, gradient.numel())
    return over_columns, over_rows[0] if len(over_rows) == 1 else over_rows.sum(0)


def norms_of(weight: torch.Tensor, gradient: torch.Tensor, share: torch.Tensor, column: torch.Tensor, eps: float
             ) -> tuple[float, float]:
    """Squared norms of weight and update, fp32 [L, R, C] with V = share [L, R] column [L, C]."""
    parts = row_spans(*weight.shape)
    found = [(0.0, 0.0)] * len(parts)
    if not without_data(weight):
        from strategies.optimizers.kernels import adafactor_norms

        arrays = [tensor.numpy() for tensor in (weight, gradient, share, column)]

        def norms(numbered: tuple[int, RowSpan]) -> None:
            found[numbered[0]] = adafactor_norms(*_within(numbered[1], *arrays), eps)

        spread_each(norms, list(enumerate(parts)), weight.numel())
    return added(found)


def apply(weight: torch.Tensor, gradient: torch.Tensor, share: torch.Tensor, column: torch.Tensor, eps: float,
          keep: float, rate: float) -> None:
    """weight = keep weight - rate update, as in `norms_of`."""
    if not without_data(weight):
        from strategies.optimizers.kernels import adafactor_apply

        arrays = [tensor.numpy() for tensor in (weight, gradient, share, column)]
        spread_each(lambda part: adafactor_apply(*_within(part, *arrays), eps, keep, rate), row_spans(*weight.shape),
                    weight.numel())


def shares_of(row: torch.Tensor, eps: float) -> torch.Tensor:
    """[L, R]: row means over the larger of their own mean and eps."""
    share = torch.ones_like(row)
    if not without_data(row):
        from strategies.optimizers.kernels import row_shares

        row_shares(row.numpy(), share.numpy(), eps)
    return share


def _within(part: RowSpan, weight: Array, gradient: Array, share: Array, column: Array) -> tuple[Array, ...]:
    return (weight[part.matrices, part.rows], gradient[part.matrices, part.rows], share[part.matrices, part.rows],
            column[part.matrices])

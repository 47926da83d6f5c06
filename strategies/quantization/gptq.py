"""GPTQ: round weights column by column, compensating each column's error in the columns still to be rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from strategies.quantization.quantizer import Grid, WeightQuantizer

BLOCK = 128  # columns whose errors are applied to later columns in one matrix product


@dataclass(frozen=True)
class Factor:
    """What layers that read the same inputs share.

    Attributes:
        order: (inputs,) columns in the order they are rounded; those that are never rounded come last.
        rounded: how many are rounded.
        moment: (inputs, inputs) damped second moment, rows and columns in that order, fp32.
        upper: (inputs, inputs) U with U^T U the inverse of `moment`, fp32.
    """

    order: torch.Tensor
    rounded: int
    moment: torch.Tensor
    upper: torch.Tensor


def factorize(moment: torch.Tensor, damping: float = 0.01, act_order: bool = True,
              whole: torch.Tensor | None = None) -> Factor:
    """Prepare a second moment for `round_weights` (Frantar et al. 2023, section 3.3, step 3).

    Args:
        moment: (inputs, inputs) X^T X. A channel that was always zero carries no information: it is rounded to nearest.
        damping: fraction of the mean diagonal that is added to the diagonal, above zero.
        act_order: whether columns with the largest moments are rounded first. This only affects the order of
            processing: the layer's columns stay where they are, and exported files need no index.
        whole: columns that are never rounded, and only compensate for the errors of others.

    Raises:
        ValueError: the damping is not above zero.
    """
    if damping <= 0:
        raise ValueError(f"a damping of {damping} cannot hold a second moment without full rank: take 0.01, or more")
    diagonal = moment.diagonal().double()
    diagonal[diagonal == 0] = 1.0
    damped = moment.double()
    damped.diagonal().copy_(diagonal + damping * diagonal.mean())
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(
        len(moment), device=moment.device)
    rounded = len(order)
    if whole is not None:
        last = torch.isin(order, whole)
        order, rounded = torch.cat([order[~last], order[last]]), rounded - len(whole)
    damped = damped[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Factor(order, rounded, damped.float(), torch.linalg.cholesky(inverse, upper=True).float())


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, quantizer: WeightQuantizer, whole: torch.Tensor | None = None
                     ) -> tuple[torch.Tensor, Grid]:
    """Weights (outputs, ...) in fp32, each rounded to nearest on the quantizer's own grid, and that grid.

    Args:
        weight: (outputs, ...).
        quantizer: finds the grid.
        whole: columns that are not rounded and do not affect the scales.
    """
    weight = weight.float()
    rest = weight if whole is None else weight.index_fill(1, whole, 0.0)
    grid = quantizer.grid(rest)
    found = quantizer.dequantize(quantizer.numbers(rest, grid), grid, torch.float32)
    return found if whole is None else found.index_copy(1, whole, weight[:, whole]), grid


@torch.no_grad()
def round_weights(weight: torch.Tensor, quantizer: WeightQuantizer, factor: Factor, sweeps: int = 2
                  ) -> tuple[torch.Tensor, Grid]:
    """Weights rounded to minimize the change of the layer's outputs on calibration rows (Frantar et al. 2023, alg. 1).

    Minimizes tr((W - W_hat) X^T X (W - W_hat)^T) = ||X (W - W_hat)^T||^2, with X^T X damped. An output for which
    rounding to nearest is better is rounded to nearest, so none is worse. The grid is that of the original weights.
    Weights that are exactly zero stay so, as pruned ones must: what others move into them is compensated further on
    (Frantar & Alistarh 2023, SparseGPT, section 3.5).
    (The paper recomputes a group's grid when its first column is reached, from weights that already compensate for
    errors: that was tried too, see docs/log.md.)

    Args:
        weight: (outputs, inputs).
        quantizer: finds the grid by its own rule.
        factor: of the layer's inputs.
        sweeps: of coordinate descent afterwards, each as much work as the main loop; none raises the error.

    Returns:
        (outputs, inputs) fp32, and the grid it is on, except for columns that are never rounded.
    """
    nearest, grid = round_to_nearest(weight, quantizer, factor.order[factor.rounded:])
    exact, nearest = weight.float()[:, factor.order], nearest[:, factor.order]
    columns = _Columns(quantizer, grid, factor, exact == 0)
    found = _compensate(exact, columns, factor)
    for _ in range(sweeps):
        _descend(exact, found, columns, factor)
    worse = _errors(found - exact, factor) > _errors(nearest - exact, factor)
    return torch.where(worse.unsqueeze(1), nearest, found)[:, factor.order.argsort()], grid


def _compensate(exact: torch.Tensor, columns: _Columns, factor: Factor) -> torch.Tensor:
    """Round one column after another, and adjust those that follow to minimize the error (eq. 2 and 4)."""
    work, upper = exact.clone(), factor.upper
    for start in range(0, factor.rounded, BLOCK):
        end = min(start + BLOCK, factor.rounded)
        errors = work.new_zeros(len(work), end - start)
        for place in range(start, end):
            rounded = columns.settle(work[:, place], place)
            error = (work[:, place] - rounded) / upper[place, place]
            work[:, place + 1:end] -= error.outer(upper[place, place + 1:end])
            work[:, place], errors[:, place - start] = rounded, error
        work[:, end:] -= errors @ upper[start:end, end:]
    for place in range(factor.rounded, work.shape[1]):
        work[:, place] = columns.settle(work[:, place], place)
    return work


def _descend(exact: torch.Tensor, found: torch.Tensor, columns: _Columns, factor: Factor) -> None:
    """Set each column, in place, to its optimum given the others (QuantEase, Behdin et al. 2023).

    With H the moment, the best value of column j is found_j + ((W - W_hat) H)_j / H_jj. It is then rounded, unless the
    column is one that never is.
    """
    moment = factor.moment
    slope = (exact - found) @ moment
    for start in range(0, len(moment), BLOCK):
        end = min(start + BLOCK, len(moment))
        steps = found.new_zeros(len(found), end - start)
        for place in range(start, end):
            best = found[:, place] + slope[:, place] / moment[place, place]
            best = columns.settle(best, place)
            step = best - found[:, place]
            slope[:, place + 1:end] -= step.outer(moment[place, place + 1:end])
            found[:, place], steps[:, place - start] = best, step
        slope[:, end:] -= steps @ moment[start:end, end:]


class _Columns:
    """Settles single columns of a matrix, identified by their position in the factor's order.

    Args:
        zeros: (outputs, inputs) in that order, True where a weight stays zero.
    """

    def __init__(self, quantizer: WeightQuantizer, grid: Grid, factor: Factor, zeros: torch.Tensor) -> None:
        self._quantizer, self._grid = replace(quantizer, group_size=None, per_tensor=False), grid
        self._groups = (factor.order // (quantizer.group_size or len(factor.order))).tolist()
        self._rounded, self._zeros = factor.rounded, zeros if quantizer.kind != "binary" and bool(zeros.any()) else None

    def settle(self, values: torch.Tensor, place: int) -> torch.Tensor:
        """A column's values (outputs,), rounded unless the column never is, and zero where they stay so."""
        values = self._round(values, place) if place < self._rounded else values
        return values if self._zeros is None else values.masked_fill(self._zeros[:, place], 0.0)

    def _round(self, values: torch.Tensor, place: int) -> torch.Tensor:
        """A column's values (outputs,), each rounded to nearest on its grid."""
        group = slice(self._groups[place], self._groups[place] + 1)
        grid = Grid(*(None if part is None else part[:, group] for part in self._grid))
        numbers = self._quantizer.numbers(values.unsqueeze(1), grid)
        return self._quantizer.dequantize(numbers, grid, torch.float32).squeeze(1)


def _errors(difference: torch.Tensor, factor: Factor) -> torch.Tensor:
    """(outputs,) squared errors of outputs, from errors of weights (outputs, inputs)."""
    return (difference @ factor.moment).mul_(difference).sum(1)

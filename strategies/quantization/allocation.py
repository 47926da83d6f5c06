"""Bit allocation: choose a quantizer for each layer so that the loss rises least within a budget, solved exactly."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from strategies.common.highs import mixed_integer
from strategies.quantization.quantizer import WeightQuantizer
from strategies.quantization.sensitivity import Candidate, Sensitivity

_COLORS = {"allocated": "#c2410c", "uniform": "#2563eb"}
_BASE = 2**15  # base of the digits that bytes are split into
_LARGEST_RISE = 1e6  # rises are scaled to this, so that the solver's absolute tolerances (<= 1e-6) are 1e-12 of it


@dataclass(frozen=True)
class Allocation:
    """A quantizer for each layer.

    Attributes:
        choice: by layer name; None leaves a layer in full precision.
        bytes: of all these layers, counted as `sensitivity.stored_bytes` does.
        rise: of the loss, predicted as the sum of the layers' own.
        gap: upper bound on how much lower the rise of another allocation within the budget could be; 0 if proven
            optimal.
        seconds: of all layers, if the budget was in seconds.
    """

    choice: Mapping[str, Candidate]
    bytes: int
    rise: float
    gap: float = 0.0
    seconds: float | None = None

    @property
    def rules(self) -> list[tuple[str, Candidate]]:
        """The `rules` for `strategies.quantization.qat.prepare`, to pass with the same `ignore` and `embeddings`."""
        return [(glob.escape(name), quantizer) for name, quantizer in self.choice.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        choice = {name: quantizer and {**asdict(quantizer), "scale_dtype": _dtype_name(quantizer.scale_dtype)}
                  for name, quantizer in self.choice.items()}
        return {**self.__dict__, "choice": choice}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Allocation:
        """The allocation that `to_json` wrote."""
        choice = {name: own and WeightQuantizer(**{**own, "scale_dtype": getattr(torch, own["scale_dtype"])})
                  for name, own in values["choice"].items()}
        return cls(**{**values, "choice": choice})


def allocate(sensitivity: Sensitivity, budget: float, seconds: numpy.ndarray | None = None,
             time_limit: float = 60.0) -> Allocation:
    """The allocation with the least total rise within a budget (survey eq. 14), as an integer program.

        min sum_lc rise_lc x_lc        sum_c x_lc = 1 for each layer l        sum_lc cost_lc x_lc <= budget

    with x_lc in {0, 1}: layer l gets candidate c. HiGHS solves it to optimality. Costs in bytes are integers, and are
    compared with the budget exactly.

    Args:
        sensitivity: what each candidate costs in each layer.
        budget: in bytes, or in seconds if `seconds` is given.
        seconds: [layers, candidates] of each layer, however they were measured.
        time_limit: seconds for the solver; the best found by then is returned with its gap.

    Raises:
        ValueError: the budget is below the minimum possible, which the message gives.
    """
    costs = sensitivity.bytes if seconds is None else numpy.asarray(seconds, dtype=numpy.float64)
    if costs.shape != sensitivity.rises.shape:
        raise ValueError(f"seconds are needed for {sensitivity.rises.shape[0]} layers and {sensitivity.rises.shape[1]} "
                         f"candidates, not {costs.shape}")
    least, unit = _sum(costs.min(1)), "bytes" if seconds is None else "seconds"
    if not budget >= least:
        raise ValueError(f"a budget of {budget:,} {unit} is below the least that these candidates can take, {least:,} "
                         f"{unit}: raise it, or offer candidates of fewer {'bits' if seconds is None else unit}")
    chosen, gap = _solve(sensitivity.rises, costs, budget, time_limit)
    return _allocation(sensitivity, chosen, gap, seconds)


def uniform(sensitivity: Sensitivity) -> list[Allocation]:
    """One allocation for each candidate, used in all layers."""
    layers = len(sensitivity.layers)
    return [_allocation(sensitivity, numpy.full(layers, column)) for column in range(len(sensitivity.candidates))]


def curve(sensitivity: Sensitivity, points: int = 16, time_limit: float = 60.0) -> list[Allocation]:
    """Optimal allocations from the fewest to the most bytes that the candidates take (points of the Pareto front).

    Budgets are evenly spaced and include those of the uniform allocations, so that the curve is never above these.

    Args:
        sensitivity: what each candidate costs in each layer.
        points: number of evenly spaced budgets, both ends included.
        time_limit: seconds for each.

    Returns:
        Allocations by increasing budget, without repetitions.
    """
    least, most = int(sensitivity.bytes.min(1).sum()), int(sensitivity.bytes.max(1).sum())
    budgets = {least + (most - least) * step // (points - 1) for step in range(points)} if points > 1 else {most}
    budgets |= {allocation.bytes for allocation in uniform(sensitivity)}
    found: list[Allocation] = []
    for budget in sorted(budgets):
        allocation = allocate(sensitivity, budget, time_limit=time_limit)
        if not found or allocation.rise < found[-1].rise:
            found.append(allocation)
    return found


def rows(allocations: Sequence[Allocation]) -> list[dict[str, Any]]:
    """Allocations as rows of a table: bytes, rise, gap, and how many layers have each quantizer."""
    result = []
    for allocation in allocations:
        counts: dict[str, int] = {}
        for quantizer in allocation.choice.values():
            counts[label(quantizer)] = counts.get(label(quantizer), 0) + 1
        result.append({"bytes": allocation.bytes, "rise": allocation.rise, "gap": allocation.gap, "layers": counts})
    return result


def label(quantizer: Candidate) -> str:
    """A short name for a candidate."""
    if quantizer is None:
        return "full"
    return f"{quantizer.bits} bits" if quantizer.kind == "int" else quantizer.kind


def draw_curve(allocated: Sequence[Allocation], uniform: Sequence[Allocation], path: Path | str,
               measured: Sequence[float] | None = None) -> Path:
    """Write a PNG (840 x 432 pixels) of predicted rise against bytes and return its path.

    Args:
        allocated: allocations from `curve`.
        uniform: points to compare with, labeled by their bits.
        path: the file, which is overwritten.
        measured: rises of the allocations measured with all layers quantized at once, drawn dotted.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    sizes = [allocation.bytes / 2**20 for allocation in allocated]
    axes.plot(sizes, [allocation.rise for allocation in allocated], marker="o", markersize=4, linewidth=1.4,
              color=_COLORS["allocated"], drawstyle="steps-post", label="allocated, predicted")
    if measured is not None:
        axes.plot(sizes, measured, linestyle=":", marker="x", markersize=5, color=_COLORS["allocated"],
                  label="allocated, measured")
    axes.scatter([allocation.bytes / 2**20 for allocation in uniform], [allocation.rise for allocation in uniform],
                 marker="s", s=36, color=_COLORS["uniform"], label="uniform, predicted", zorder=3)
    for allocation in uniform:
        axes.annotate(label(next(iter(allocation.choice.values()))), (allocation.bytes / 2**20, allocation.rise),
                      xytext=(5, 5), textcoords="offset points", fontsize=9, color="#4b5563")
    if all(allocation.rise > 0 for allocation in [*allocated, *uniform]):
        axes.set_yscale("log")
    axes.set(title="Bit allocation", xlabel="MiB of quantized layers", ylabel="rise of the loss")
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


# ---- the integer program

def _solve(rises: numpy.ndarray, costs: numpy.ndarray, budget: float, time_limit: float) -> tuple[numpy.ndarray, float]:
    """Columns chosen [layers], and an upper bound on how much lower the rise of another choice within the budget is."""
    layers, columns = rises.shape
    lowest = rises.min(1, keepdims=True)
    unit = (float((rises - lowest).max()) or 1.0) / _LARGEST_RISE
    limits, carries = _limits(costs, budget)
    one = scipy.sparse.kron(scipy.sparse.eye_array(layers), numpy.ones((1, columns)))
    matrix = [scipy.sparse.hstack([one, numpy.zeros((layers, carries))]), *(row for row, _ in limits)]
    low, high = [1.0] * layers + [-numpy.inf] * len(limits), [1.0] * layers + [room for _, room in limits]
    upper = numpy.append(numpy.ones(rises.size), numpy.full(carries, numpy.inf))
    end = time.monotonic() + time_limit
    while True:
        found = mixed_integer(
            numpy.append(((rises - lowest) / unit).ravel(), numpy.zeros(carries)),
            bounds=scipy.optimize.Bounds(0, upper),
            constraints=scipy.optimize.LinearConstraint(scipy.sparse.vstack(matrix, format="csr"), low, high),
            integrality=numpy.ones(rises.size + carries),
            options={"mip_rel_gap": 0.0, "time_limit": max(0.0, end - time.monotonic())})
        chosen = costs.argmin(1) if found.x is None else found.x[:rises.size].reshape(rises.shape).argmax(1)
        if _sum(costs[numpy.arange(layers), chosen]) <= budget:
            break
        # The choice exceeds the budget by less than the solver's tolerance: exclude it and solve again.
        row = (numpy.arange(columns) == chosen[:, None]).astype(float).ravel()
        matrix.append(numpy.append(row, numpy.zeros(carries)).reshape(1, -1))
        low, high = [*low, -numpy.inf], [*high, layers - 1.0]
    bound = math.fsum(lowest.ravel()) + max(0.0, found.mip_dual_bound or 0.0) * unit
    gap = math.fsum(rises[numpy.arange(layers), chosen]) - bound
    return chosen, gap if gap > 1e-5 * unit else 0.0


def _limits(costs: numpy.ndarray, budget: float) -> tuple[list[tuple[numpy.ndarray, float]], int]:
    """Constraint rows that together keep costs within the budget, and how many carry variables they have.

    A solver accepts a sum that is too large by a part in 1e10. So bytes, above each layer's minimum and in units of
    their greatest common divisor, are split into two digits of base D, with an integer carry:

        sum high_lc x_lc + carry <= high        sum low_lc x_lc - D carry <= low

    in which one unit exceeds any tolerance.

    Returns:
        (row, limit) pairs, and the number of carries.
    """
    extra = costs - costs.min(1, keepdims=True)
    room = min(budget - _sum(costs.min(1)), _sum(extra.max(1)))
    if not numpy.issubdtype(costs.dtype, numpy.integer):
        unit = float(extra.max()) or 1.0
        return [(extra.reshape(1, -1) / unit, room / unit)], 0
    unit = int(numpy.gcd.reduce(extra, axis=None)) or 1
    extra, room = (extra // unit).astype(float).ravel(), int(room) // unit
    if room < _BASE:
        return [(extra.reshape(1, -1), room)], 0
    high, low = numpy.append(extra // _BASE, 1), numpy.append(extra % _BASE, -_BASE)
    return [(high.reshape(1, -1), room // _BASE), (low.reshape(1, -1), room % _BASE)], 1


def _allocation(sensitivity: Sensitivity, chosen: numpy.ndarray, gap: float = 0.0,
                seconds: numpy.ndarray | None = None) -> Allocation:
    taken = numpy.arange(len(chosen)), chosen
    choice = {name: sensitivity.candidates[column] for names, column in zip(sensitivity.layers, chosen, strict=True)
              for name in names}
    return Allocation(choice, int(sensitivity.bytes[taken].sum()), math.fsum(sensitivity.rises[taken]), gap,
                      None if seconds is None else _sum(numpy.asarray(seconds, dtype=numpy.float64)[taken]))


def _sum(values: numpy.ndarray) -> float | int:
    return int(values.sum()) if numpy.issubdtype(values.dtype, numpy.integer) else math.fsum(values)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

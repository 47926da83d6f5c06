"""LAMB's compiled passes over parts of parameters: the second finds in a cache what the first one left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from strategies.common.shards import Layout, local, local_of
from strategies.optimizers.passes import number_of, spans, spread, without_data

Array = np.ndarray[Any, Any]


class LambPart(Protocol):
    """A rank's fp32 elements of one parameter on CPU, flat, with its moments, step and settings."""

    weight: torch.Tensor
    gradient: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    settings: dict[str, Any]


class Table:
    """Rows of `kernels.lamb_advance`: addresses and scalars of runs of elements.

    Attributes:
        owners: of each row, what it is part of.
    """

    def __init__(self) -> None:
        self.owners: list[Any] = []
        self._rows: list[tuple[int, ...]] = []
        self._scalars: list[tuple[float, ...]] = []
        self._known: dict[tuple[int, float], tuple[float, ...]] = {}

    def add(self, owner: Any, addresses: Sequence[int], begin: int, length: int, step: float, settings: dict[str, Any]
            ) -> None:
        """Add a run that begins `begin` elements behind the addresses of weight, gradient and both moments."""
        self.owners.append(owner)
        self._rows.append((*(address + 4 * begin for address in addresses), length))
        key = id(settings), step
        if key not in self._known:
            self._known[key] = _scalars(step, settings)
        self._scalars.append(self._known[key])

    def arrays(self) -> tuple[Array, Array]:
        """`table` and `scalars` of the kernels."""
        return np.array(self._rows, dtype=np.int64).reshape(-1, 5), np.array(self._scalars).reshape(-1, 7)


def _scalars(step: float, settings: dict[str, Any]) -> tuple[float, ...]:
    """(c, e, weight decay, betas, lr, bound of the trust ratio), where mean / (c sqrt(square) + e) is r."""
    first, second = (-math.expm1(step * math.log(beta)) if beta else 1.0 for beta in settings["betas"])
    bound = settings["max_trust_ratio"]
    return (first / math.sqrt(second), first * settings["eps"], float(settings["weight_decay"]), *settings["betas"],
            float(settings["lr"]), math.inf if bound is None else float(bound))


# ---- whole parameters of one span each

def add_whole(table: Table, tensor: torch.Tensor, state: dict[str, torch.Tensor], layout: Layout,
              settings: dict[str, Any]) -> None:
    """Add the pieces of a tensor whose step has been counted; each row's owner is (tensor, its piece's number)."""
    weight = local_of(tensor)
    if without_data(weight):
        return
    step = number_of(state["step"])
    addresses = [one.data_ptr() for one in (weight, local(tensor.grad), state["exp_avg"], state["exp_avg_sq"])]
    for number, piece in enumerate(layout.pieces):
        table.add((tensor, number), addresses, piece.offset, piece.numel, step, settings)


def step_whole(table: Table) -> torch.Tensor:
    """Step what was added. [rows]: trust ratios."""
    ratios = torch.ones(len(table.owners), dtype=torch.float64)
    if table.owners:
        from strategies.optimizers.kernels import lamb_step

        (rows, scalars), found = table.arrays(), ratios.numpy()
        spread(lambda run: lamb_step(rows[run], scalars[run], found[run]), rows[:, 4])
    return ratios


# ---- parts that are large or shared

def advance(parts: Sequence[LambPart]) -> torch.Tensor:
    """Advance the moments. [parts, 2]: squared norms of weights and updates."""
    found = torch.zeros(len(parts), 2, dtype=torch.float64)
    table = _spans_of(parts)
    if table.owners:
        from strategies.optimizers.kernels import lamb_advance

        rows, scalars = table.arrays()
        norms = np.empty((len(rows), 2))
        spread(lambda run: lamb_advance(rows[run], scalars[run], norms[run]), rows[:, 4])
        np.add.at(found.numpy(), table.owners, norms)  # one after another, in the order of the spans
    return found


def apply(parts: Sequence[LambPart], rates: torch.Tensor) -> None:
    """Subtract updates times rates [parts] from the weights; the moments are this step's."""
    table = _spans_of(parts)
    if table.owners:
        from strategies.optimizers.kernels import lamb_apply

        (rows, scalars), factors = table.arrays(), rates.double().numpy()[table.owners]
        spread(lambda run: lamb_apply(rows[run], scalars[run], factors[run]), rows[:, 4])


def _spans_of(parts: Sequence[LambPart]) -> Table:
    """Rows of all spans; each one's owner is the index of its part. Empty if there is no data."""
    table = Table()
    if without_data(parts[0].weight):
        return table
    for number, part in enumerate(parts):
        addresses = [0 if one is None else one.data_ptr()
                     for one in (part.weight, part.gradient, part.exp_avg, part.exp_avg_sq)]
        step = number_of(part.step)
        for begin, length in spans(part.weight.numel()):
            table.add(number, addresses, begin, length, step, part.settings)
    return table

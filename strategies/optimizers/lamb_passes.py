"""LAMB's compiled passes over parts of parameters: the second finds in a cache what the first one left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

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


def advance(parts: Sequence[LambPart]) -> torch.Tensor:
    """Advance the moments. [parts, 2]: squared norms of weights and updates."""
    found = torch.zeros(len(parts), 2, dtype=torch.float64)
    if not without_data(parts[0].weight):
        from strategies.optimizers.kernels import lamb_advance

        table, scalars, owner = _table(parts)
        norms, betas = np.empty((len(table), 2)), parts[0].settings["betas"]
        spread(lambda run: lamb_advance(table[run], scalars[run], betas, norms[run]), table[:, 4])
        np.add.at(found.numpy(), owner, norms)  # one after another, in the order of the spans
    return found


def apply(parts: Sequence[LambPart], rates: torch.Tensor) -> None:
    """Subtract updates times rates [parts] from the weights; the moments are this step's."""
    if not without_data(parts[0].weight):
        from strategies.optimizers.kernels import lamb_apply

        table, scalars, owner = _table(parts)
        factors = rates.double().numpy()[owner]
        spread(lambda run: lamb_apply(table[run], scalars[run], factors[run]), table[:, 4])


def step(parts: Sequence[LambPart], lr: float, bound: float) -> torch.Tensor:
    """Both for whole parameters of one span each. [parts]: trust ratios, at most `bound`."""
    ratios = torch.ones(len(parts), dtype=torch.float64)
    if not without_data(parts[0].weight):
        from strategies.optimizers.kernels import lamb_step

        table, scalars, _ = _table(parts)
        betas, found = parts[0].settings["betas"], ratios.numpy()
        spread(lambda run: lamb_step(table[run], scalars[run], betas, lr, bound, found[run]), table[:, 4])
    return ratios


def _table(parts: Sequence[LambPart]) -> tuple[Array, Array, Array]:
    """`table` and `scalars` of `kernels.lamb_advance`, a row for each span, and the index of its part."""
    rows, scalars, owner = [], [], []
    for number, part in enumerate(parts):
        addresses = [0 if tensor is None else tensor.data_ptr()
                     for tensor in (part.weight, part.gradient, part.exp_avg, part.exp_avg_sq)]
        own = _scalars(part)
        for begin, length in spans(part.weight.numel()):
            rows.append([*(address + 4 * begin for address in addresses), length])
            scalars.append(own)
            owner.append(number)
    return np.array(rows, dtype=np.int64), np.array(scalars), np.array(owner)


def _scalars(part: LambPart) -> tuple[float, float, float]:
    """c, e and weight decay, where mean / (c sqrt(square) + e) is r."""
    number = number_of(part.step)
    first, second = (-math.expm1(number * math.log(beta)) if beta else 1.0 for beta in part.settings["betas"])
    return first / math.sqrt(second), first * part.settings["eps"], float(part.settings["weight_decay"])

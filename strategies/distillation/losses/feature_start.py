"""What feature losses need before the first step: the spread of the teacher's hidden states, and fitted projections.

Hidden states of a residual stream grow with depth, by orders of magnitude and differently in every model, so that a
plain squared error is dominated by the deepest pair and swamps the loss on the outputs. Divided by the variance of the
teacher's states, it is the share of that variance which the student does not explain: 1 for a student that knows only
the mean, whatever the model. The teacher is frozen, so that its variance is measured once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from strategies.distillation.losses.features import Projections
from strategies.distillation.losses.fused_head import hidden_states
from strategies.distillation.losses.layer_map import Pairs
from strategies.distillation.losses.recorder import Values

RIDGE = 1e-3  # of the mean square of the student's states: keeps the solution of nearly dependent ones small


@torch.no_grad()
def teacher_variances(teacher: nn.Module, layers: Iterable[int], batches: Iterable[tuple[Mapping[str, Any],
                      torch.Tensor]]) -> dict[int, float]:
    """Variance over tokens of each teacher layer's hidden states, averaged over the width, in float64.

    Args:
        layers: layers of the teacher.
        batches: arguments of a forward, and its (batch, sequence) bool mask of the tokens that count.
    """
    sums: dict[int, list[Any]] = {}
    recorder = Values(teacher, layers, ["hidden"])
    for inputs, kept in batches:
        with recorder:
            _run(teacher, inputs)
            for layer in layers:
                states = _kept(recorder.of(layer, "hidden"), kept)
                count, total, squares = sums.get(layer, (0, 0, 0))
                sums[layer] = [count + len(states), total + states.sum(0), squares + states.square().sum(0)]
        recorder.clear()
    return {layer: float((squares / count - (total / count).square()).mean()) or 1.0
            for layer, (count, total, squares) in sums.items()}


@torch.no_grad()
def fit_projections(student: nn.Module, teacher: nn.Module, projections: Projections, pairs: Pairs,
                    batches: Iterable[tuple[Mapping[str, Any], torch.Tensor]]) -> None:
    """Start projections as the ridge regression of the teacher's hidden states on the student's.

    With X (tokens, student width) and Y (tokens, teacher width) a projection is the W of the least
    ||X W^T - Y||^2 + r ||W||^2, r = `RIDGE` times the tokens times the mean square of X; solved in float64.

    Args:
        student: without dropout in its forward, that is, in evaluation mode.
        batches: as for `teacher_variances`; more tokens than the student is wide.
    """
    ours, theirs = (Values(model, {pair[which] for pair in pairs}, ["hidden"])
                    for which, model in enumerate((student, teacher)))
    products: dict[int, list[Any]] = {mine: [0, 0] for mine, _ in pairs}
    for inputs, kept in batches:
        with ours, theirs:
            _run(student, inputs)
            _run(teacher, inputs)
            for mine, other in pairs:
                x, y = _kept(ours.of(mine, "hidden"), kept), _kept(theirs.of(other, "hidden"), kept)
                products[mine] = [products[mine][0] + x.T @ x, products[mine][1] + x.T @ y]
        ours.clear(), theirs.clear()
    for mine, (xx, xy) in products.items():
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
        weight = projections.by_layer[str(mine)].weight
        weight.copy_(torch.linalg.solve(xx + ridge, xy).T)


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A forward, on the device that the model is on, without logits."""
    device = next(model.parameters()).device
    hidden_states(model, {name: value.to(device) if isinstance(value, torch.Tensor) else value
                          for name, value in inputs.items()})


def _kept(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The states (tokens, width) at the tokens that count, on the host in float64."""
    return states[kept.to(states.device)].double().cpu()

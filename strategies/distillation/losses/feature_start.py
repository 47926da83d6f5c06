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

from strategies.distillation.losses.features import Projections, as_tokens
from strategies.distillation.losses.fused_head import hidden_states
from strategies.distillation.losses.intermediate import Seen
from strategies.distillation.losses.layer_map import Pairs
from strategies.distillation.losses.recorder import Values

RIDGE = 1e-3  # of the mean square of the student's states: keeps the solution of nearly dependent ones small


@torch.no_grad()
def teacher_variances(teacher: nn.Module, layers: Iterable[int], batches: Iterable[tuple[Mapping[str, Any],
                      torch.Tensor]]) -> dict[int, float]:
    """Variance over tokens of each teacher layer's hidden states, averaged over the width, in float64.

    Args:
        layers: layers of the teacher.
        batches: arguments of a forward and its targets, which say which tokens count; see `Seen`.
    """
    sums: dict[int, list[Any]] = {}
    recorder = Values(teacher, layers, ["hidden"])
    for inputs, targets in batches:
        with recorder:
            _run(teacher, inputs)
            for layer in layers:
                found = recorder.of(layer, "hidden")
                states = _kept(as_tokens(found, found)[1], inputs, targets)
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
    products: dict[int, list[Any]] = {mine: [0, 0] for mine, _ in pairs if str(mine) in projections.by_layer}
    pairs = tuple(pair for pair in pairs if str(pair[0]) in projections.by_layer)
    for inputs, targets in batches:
        with ours, theirs:
            _run(student, inputs)
            _run(teacher, inputs)
            for mine, other in pairs:
                x, y = (_kept(one, inputs, targets) for one in as_tokens(
                    ours.of(mine, "hidden"), theirs.of(other, "hidden")))
                products[mine] = [products[mine][0] + x.T @ x, products[mine][1] + x.T @ y]
        ours.clear(), theirs.clear()
    for mine, (xx, xy) in products.items():
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
        weight = projections.by_layer[str(mine)].weight
        weight.copy_(torch.linalg.solve(xx + ridge, xy).T)


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A forward, on the device that the model is on, without logits."""
    device = next(model.parameters()).device
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    if "attention_mask" in given or "pixel_values" in given:  # a classifier, whose logits are few
        model(**given)
    else:
        hidden_states(model, given)


def _kept(states: torch.Tensor, inputs: Mapping[str, Any], targets: torch.Tensor) -> torch.Tensor:
    """The states (tokens, width) at the tokens that count, on the host in float64."""
    return states.cpu()[Seen(targets, inputs).kept(states.cpu())].double()

"""Weights that stay zero while a model is trained, on a rank's own part of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from strategies.common.shards import local


class SparseWeights:
    """Keeps the weights zero that are zero when this is made, whatever the optimizer does.

    Gradients of zeros are set to zero before their norm is taken, so that neither clipping nor the statistics of an
    optimizer see them, and the zeros are put back after each step: an optimizer may move a weight that has no gradient,
    as Muon does. Parameters may be whole or sharded (DTensor); a mask has one byte for each weight of the rank's part.

    Attributes:
        weights: the parameters, by name.
        pruned: True where a weight stays zero, in the shape of the rank's part, by name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Args:
            model: its parameters may be sharded already.
            names: of the parameters; those that are not trained are left out.
        """
        wanted = frozenset(names)
        self.weights = {name: weight for name, weight in model.named_parameters()
                        if name in wanted and weight.requires_grad}
        self.pruned: dict[str, torch.Tensor] = {}
        self.read_zeros()

    def read_zeros(self) -> None:
        """Take the zeros that there are now, as those of a checkpoint that was loaded."""
        self.pruned = {name: local(weight) == 0 for name, weight in self.weights.items()}

    def mask_gradients(self) -> None:
        """Set gradients of weights that stay zero to zero."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                local(weight.grad).masked_fill_(self.pruned[name], 0.0)

    def before_step(self) -> None:
        """Called before the optimizer steps, with the gradients that it gets."""

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set weights back to zero, after the optimizer has stepped."""
        for name, weight in self.weights.items():
            local(weight).masked_fill_(self.pruned[name], 0.0)

    def prune(self, step: int) -> None:
        """Called before each step, with the number of steps done: a schedule may ask for more zeros."""

    def scores(self, name: str) -> torch.Tensor | None:
        """Numbers of a parameter's elements (in the shape of the rank's part) that a checkpoint has to hold, if any."""
        return None

    def resident(self) -> list[torch.Tensor]:
        """The tensors that take memory between steps."""
        return list(self.pruned.values())

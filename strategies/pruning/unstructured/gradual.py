"""Zeros that grow in number during training: by magnitude, or by the movement of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from strategies.common.shards import layout_of, local
from strategies.pruning.unstructured.prunable_layers import as_stored, rows_of, weight_names
from strategies.pruning.unstructured.sparse_weights import SparseWeights
from strategies.pruning.unstructured.sparsity_pattern import Pattern


@dataclass(frozen=True)
class CubicSchedule:
    """The share of zeros over the steps of a run (Zhu and Gupta 2018, arXiv 1710.01878, eq. 1; survey eq. 8).

        s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3        with s_i = 0

    Attributes:
        begin: step t_0, from which on weights are pruned.
        end: step t_1, at which the share is the final one.
        every: steps between changes.
        final: the final share s_f.
    """

    begin: int
    end: int
    every: int
    final: float

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end or self.every < 1:
            raise ValueError(f"a schedule begins at or before its end, and changes every step at most: {self}")

    def at(self, step: int) -> float | None:
        """The share of zeros from a step on, or None if it does not change there."""
        if not self.begin <= step <= self.end or (step != self.end and (step - self.begin) % self.every):
            return None
        left = (self.end - step) / max(1, self.end - self.begin)
        return self.final * (1 - left**3)

    def reached(self, step: int) -> float:
        """The share of zeros that there are in a step: that of the last change."""
        changes = (self.at(before) for before in range(min(step, self.end), self.begin - 1, -1))
        return next((share for share in changes if share is not None), 0.0)


class GradualPruning(SparseWeights):
    """Prunes more and more weights of each layer; a weight that has been pruned stays zero.

    - magnitude: the smallest weights (Zhu and Gupta 2018).
    - movement: the weights of the smallest scores S = - sum over steps of w g, with g the gradient that the optimizer
      gets: those that training moves towards zero (Sanh et al. 2020, arXiv 2005.07683, eq. 5). The paper keeps the
      values of pruned weights and may bring them back; here they are gone.

    With an N:M pattern the share s_t prunes round(s_t M) weights of every M in a row.

    Layers are compared as a whole, so each is gathered when its mask changes, one at a time and on every rank: a
    collective call.

    Args:
        model: its parameters may be sharded already; those that are zero are not taken for pruned.
        layers: the layers to prune, by name; see `prunable_layers.prunable`.
        pattern: what is kept in the end.
        schedule: how much is pruned until then, in steps.
        method: how weights are chosen.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], pattern: Pattern, schedule: CubicSchedule,
                 method: Literal["magnitude", "movement"] = "magnitude") -> None:
        names = weight_names(model, layers)
        super().__init__(model, names)
        for mask in self.pruned.values():
            mask.zero_()  # a layer that starts with zeros is trained before it is pruned
        self.pattern, self.schedule, self.method = pattern, schedule, method
        self._model = model
        self._layers = dict(zip(names, layers.values(), strict=True))
        self._scores = {name: torch.zeros_like(local(weight), dtype=torch.float32)
                        for name, weight in self.weights.items() if method == "movement"}

    def before_step(self) -> None:
        """See `SparseWeights`; the scores of movement are summed."""
        for name, scores in self._scores.items():
            gradient = self.weights[name].grad
            if gradient is not None:
                scores.addcmul_(local(self.weights[name]), local(gradient), value=-1)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """See `SparseWeights`. A collective call."""
        share = self.schedule.at(step)
        if not share:
            return
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the last modules gathered, which would run unpruned once more
        wanted = self.pattern.at(share)
        for name, weight in self.weights.items():
            scores = local(weight).abs() if self.method == "magnitude" else self._scores[name]
            scores = scores.float().masked_fill(self.pruned[name], -torch.inf)
            self.pruned[name] = ~self._kept(name, weight, scores, wanted)
        self.mask_weights()

    def scores(self, name: str) -> torch.Tensor | None:
        """See `SparseWeights`."""
        return self._scores.get(name)

    def resident(self) -> list[torch.Tensor]:
        """See `SparseWeights`."""
        return [*super().resident(), *self._scores.values()]

    def _kept(self, name: str, weight: torch.Tensor, scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The rank's part of a layer's mask, from its part of the scores."""
        layer, piece = self._layers[name], layout_of(weight).pieces[0]
        mask = as_stored(layer, pattern.largest(rows_of(layer, _gathered(weight, scores))))
        return mask.reshape(-1)[piece.start:piece.stop].view(scores.shape)


def _gathered(weight: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The values of a whole parameter, from those of this rank's part. A collective call where it is sharded."""
    if not isinstance(weight, DTensor):
        return own
    return DTensor.from_local(own, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                              stride=weight.stride()).full_tensor()

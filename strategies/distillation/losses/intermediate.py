"""Losses between tensors inside student and teacher: hidden states, their relations, values, and attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from strategies.distillation.losses.attention import attention_map_sum, relation_sum, visible_pairs
from strategies.distillation.losses.features import NAME, cosine_distance_sum, squared_error_sum
from strategies.distillation.losses.layer_map import Pairs
from strategies.distillation.losses.recorder import Values
from strategies.distillation.losses.relations import token_angles_sum, token_distances_sum
from strategies.distillation.losses.response import IGNORED


@dataclass(frozen=True)
class Features:
    """Match hidden states of blocks, through a learned projection where widths differ (survey eq. 17).

    Attributes:
        weight: in the loss.
        pairs: (student layer, teacher layer), as from `layer_map`.
        loss: squared error or cosine distance.
        variances: of the teacher's hidden states by its layers, which the squared errors are divided by, as from
            `teacher_variances`; None for none.
    """

    weight: float
    pairs: Pairs
    loss: Literal["mse", "cosine"] = "mse"
    variances: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Relations:
    """Match distances and angles between the hidden states of a row's tokens (survey eq. 18-19; Park et al. 2019).

    Attributes:
        distance, angle: weights in the loss.
        pairs: (student layer, teacher layer).
        tokens: most tokens of each row that are compared with each other.
    """

    distance: float
    angle: float
    pairs: Pairs
    tokens: int = 16


@dataclass(frozen=True)
class ValueRelations:
    """Match the self-relations of attention values (Wang et al. 2020, MiniLM).

    Attributes:
        weight: in the loss.
        pairs: (student layer, teacher layer).
        heads: number of relation heads that values are split into.
    """

    weight: float
    pairs: Pairs
    heads: int


@dataclass(frozen=True)
class AttentionMaps:
    """Match attention maps, averaged over heads (Jiao et al. 2020, TinyBERT).

    Attributes:
        weight: in the loss.
        pairs: (student layer, teacher layer).
    """

    weight: float
    pairs: Pairs


class IntermediateTerms:
    """Records tensors inside both models while they run, and computes the losses between them.

    Args:
        student, teacher: without wrappers; both are run on the same token positions.
        features, relations, values, maps: the losses to compute; None for those without a weight.

    Raises:
        ValueError: a layer is out of range, or a model's value projections are not found.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, features: Features | None = None,
                 relations: Relations | None = None, values: ValueRelations | None = None,
                 maps: AttentionMaps | None = None) -> None:
        self.student, self.features, self.relations, self.values, self.maps = student, features, relations, values, maps
        hidden = [pair for one in (features, relations) if one is not None for pair in one.pairs]
        related = [] if values is None else values.pairs
        self._recorders = [
            (Values(model, {pair[which] for pair in hidden}, ["hidden"]),
             Values(model, {pair[which] for pair in related}))
            for which, model in enumerate((student, teacher))]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager in which to run both models and take `sums`; on exit the recorded tensors are dropped."""
        with ExitStack() as stack:
            for recorder in (recorder for both in self._recorders for recorder in both):
                stack.callback(recorder.clear)
                stack.enter_context(recorder)
            yield

    def sums(self, targets: torch.Tensor, position_ids: torch.Tensor | None, outputs: Sequence[Any] = (None, None)
             ) -> Iterator[tuple[str, float, torch.Tensor]]:
        """Yield (name, weight, value) for each loss, after both models have run.

        A value is summed over target tokens and averaged over pairs of layers.

        Args:
            targets: (batch, sequence) next tokens, or `IGNORED`.
            position_ids: (batch, sequence) for packed rows; None if each row is one document.
            outputs: the outputs of student and teacher, for attention maps.

        Raises:
            ValueError: a model returns no attention maps.
        """
        kept = targets != IGNORED
        if self.features is not None:
            yield "features", self.features.weight, self._of_features(self.features, kept)
        if self.relations is not None:
            for name, weight, sums in (("distances", self.relations.distance, token_distances_sum),
                                       ("angles", self.relations.angle, token_angles_sum)):
                if weight:
                    yield name, weight, self._mean(
                        self.relations.pairs, "hidden",
                        lambda ours, theirs, _, sums=sums: sums(ours, theirs, kept, self.relations.tokens))
        if self.values is not None or self.maps is not None:
            visible = visible_pairs(torch.ones_like(kept), position_ids, causal=True)
        if self.values is not None:
            yield "values", self.values.weight, self._mean(
                self.values.pairs, "value", lambda ours, theirs, _: relation_sum(ours, theirs, kept, visible,
                                                                                 self.values.heads))
        if self.maps is not None:
            ours, theirs = map(_attentions, outputs)
            found = [attention_map_sum(ours[mine], theirs[other], kept, visible, average_heads=True)
                     for mine, other in self.maps.pairs]
            yield "attention_maps", self.maps.weight, torch.stack(found).sum() / len(found)

    def _of_features(self, asked: Features, kept: torch.Tensor) -> torch.Tensor:
        distance = squared_error_sum if asked.loss == "mse" else cosine_distance_sum

        def loss(ours: torch.Tensor, theirs: torch.Tensor, pair: tuple[int, int]) -> torch.Tensor:
            found = distance(self._projected(ours, pair[0]), theirs, kept)
            return found if asked.variances is None else found / asked.variances[pair[1]]

        return self._mean(asked.pairs, "hidden", loss)

    def _mean(self, pairs: Pairs, kind: str, loss) -> torch.Tensor:
        ours, theirs = (both[kind == "value"] for both in self._recorders)
        found = [loss(ours.of(mine, kind), theirs.of(other, kind), (mine, other)) for mine, other in pairs]
        return torch.stack(found).sum() / len(found)

    def _projected(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        projections = getattr(self.student, NAME, None)
        return hidden if projections is None else projections(hidden, layer)


def _attentions(output: Any) -> Sequence[torch.Tensor]:
    """The attention maps (batch, heads, query, key) of each block."""
    maps = getattr(output, "attentions", None)
    if not maps or maps[0] is None:
        raise ValueError("a model returns no attention maps: ask it for them (output_attentions=True), and load it "
                         'with attn_implementation="eager", since fused attention never makes them')
    return maps

"""Losses between tensors inside student and teacher: hidden states, their relations, values, and attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from strategies.distillation.losses.attention import attention_map_sum, relation_sum, visible_pairs
from strategies.distillation.losses.features import NAME, as_tokens, cosine_distance_sum, squared_error_sum
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


class Seen:
    """Which positions of a batch count, and which of them see each other.

    Args:
        targets, inputs: as in `IntermediateTerms.sums`.
    """

    def __init__(self, targets: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        self.targets, self.mask, self.positions = targets != IGNORED, inputs.get("attention_mask"), inputs.get(
            "position_ids")
        self.classifies = self.mask is not None or "pixel_values" in inputs

    def kept(self, like: torch.Tensor) -> torch.Tensor:
        """(batch, sequence) mask of the positions of a tensor (batch, sequence, ...) that are compared.

        Of a classifier these are all tokens or patches of the rows that have a target.
        """
        if not self.classifies:
            return self.targets
        rows = self.targets if self.targets.ndim == 1 else self.targets.any(1)
        kept = rows[:, None].expand(like.shape[:2])
        return kept if self.mask is None else kept & self.mask.bool()

    def visible(self, like: torch.Tensor) -> torch.Tensor:
        """(batch, 1, query, key) mask of the pairs of positions that see each other."""
        if not self.classifies:
            return visible_pairs(torch.ones_like(self.targets), self.positions, causal=True)
        real = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if self.mask is None else \
            self.mask.bool()
        return visible_pairs(real, causal=False)

    def scaled(self, total: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A sum over kept positions of a classifier as their mean times the number of targets."""
        if not self.classifies:
            return total
        return total * (self.targets.sum() / self.kept(like).sum().clamp(min=1))


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

    def sums(self, targets: torch.Tensor, inputs: Mapping[str, Any], outputs: Sequence[Any] = (None, None)
             ) -> Iterator[tuple[str, float, torch.Tensor]]:
        """Yield (name, weight, value) for each loss, after both models have run.

        A value is averaged over pairs of layers, and over tokens: it is summed over target tokens of a language model;
        of a classifier it is the mean over all tokens times the number of targets. So the sum over calls, divided by
        all targets, is a mean for both.

        Args:
            targets: (batch, sequence) next tokens or classes, or (batch,) classes; `IGNORED` where there is none.
            inputs: arguments of the models. `attention_mask` (batch, sequence) says what is padding to a classifier of
                texts; `position_ids` (batch, sequence) of a language model restart at each document of a row.
            outputs: the outputs of student and teacher, for attention maps.

        Raises:
            ValueError: a model returns no attention maps.
        """
        seen = Seen(targets, inputs)
        if self.features is not None:
            yield "features", self.features.weight, self._of_features(self.features, seen)
        if self.relations is not None:
            for name, weight, sums in (("distances", self.relations.distance, token_distances_sum),
                                       ("angles", self.relations.angle, token_angles_sum)):
                if weight:
                    yield name, weight, self._mean(
                        self.relations.pairs, "hidden",
                        lambda ours, theirs, _, sums=sums: seen.scaled(
                            sums(ours, theirs, seen.kept(theirs), self.relations.tokens), theirs))
        if self.values is not None:
            yield "values", self.values.weight, self._mean(
                self.values.pairs, "value", lambda ours, theirs, _: seen.scaled(relation_sum(
                    ours, theirs, seen.kept(theirs), seen.visible(theirs), self.values.heads), theirs))
        if self.maps is not None:
            ours, theirs = map(_attentions, outputs)
            found = [seen.scaled(attention_map_sum(ours[mine], theirs[other], seen.kept(theirs[other][:, 0]),
                                                   seen.visible(theirs[other][:, 0]), average_heads=True),
                                 theirs[other][:, 0]) for mine, other in self.maps.pairs]
            yield "attention_maps", self.maps.weight, torch.stack(found).sum() / len(found)

    def _of_features(self, asked: Features, seen: Seen) -> torch.Tensor:
        distance = squared_error_sum if asked.loss == "mse" else cosine_distance_sum

        def loss(ours: torch.Tensor, theirs: torch.Tensor, pair: tuple[int, int]) -> torch.Tensor:
            found = seen.scaled(distance(self._projected(ours, pair[0]), theirs, seen.kept(theirs)), theirs)
            return found if asked.variances is None else found / asked.variances[pair[1]]

        return self._mean(asked.pairs, "hidden", loss)

    def _mean(self, pairs: Pairs, kind: str, loss) -> torch.Tensor:
        ours, theirs = (both[kind == "value"] for both in self._recorders)
        found = [loss(*as_tokens(ours.of(mine, kind), theirs.of(other, kind)), (mine, other)) for mine, other in pairs]
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

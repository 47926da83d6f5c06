"""Experiment nodes for the objective: cross-entropy, divergence from the teacher, and intermediate losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError, error_context
from trainer.experiment.exit_nodes import EarlyExits
from trainer.experiment.node import Node, Weight
from trainer.experiment.scheduled import (
    ScheduledFraction,
    ScheduledShare,
    ScheduledTemperature,
    ScheduledWeight,
    highest,
    moves,
    value_at,
)

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    from strategies.distillation.losses.response import ResponseObjective

INSIDE = ("features", "relations", "values", "attention_maps")  # losses on intermediate activations
SCHEDULED = ("cross_entropy", "weight", "temperature", "share", "distance", "angle", "fraction")  # may be points
MIXTURES = ("jsd", "skewed_kl", "skewed_reverse_kl")
SMOOTH = ("forward_kl", "reverse_kl", *MIXTURES)  # divergences with a curvature where both distributions agree


class Divergence(Node):
    """The divergence between the student's and the teacher's distributions at each token, and its weight."""

    name: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation", "uld"] = (
        "forward_kl")
    """KL(teacher || student), its reverse, a mixture, or sorted probabilities across tokenizers (uld)."""
    weight: ScheduledWeight | None = None
    """Weight in the loss, or points [fraction of the run, weight]; null: 1 with a teacher, else 0."""
    temperature: ScheduledTemperature = 2.0
    """Divides the logits of both models; above 1 softens them. The loss is scaled by its square (survey eq. 15-16)."""
    share: ScheduledShare | None = None
    """Mixture weight: teacher's in jsd (null: 0.5) and skewed_kl (0.1), student's in skewed_reverse_kl (0.1)."""
    normalized: bool | None = None
    """Divide jsd and skewed ones by their curvature: weights mean what they mean for KL (jsd at 0.5: x4); null: yes."""

    @model_validator(mode="before")
    @classmethod
    def _comparable(cls, values: Any) -> Any:
        """Mixtures are normalized unless the file says otherwise; said here, so that a run folder has it in writing."""
        if isinstance(values, dict) and values.get("normalized") is None:
            return {**values, "normalized": values.get("name") in MIXTURES}
        return values

    @model_validator(mode="after")
    def _mixes(self) -> Divergence:
        if self.share is not None and self.name not in MIXTURES:
            raise UserError("share", f"{self.name} mixes nothing", value=self.share,
                            way_out=f"leave it out, or use {', '.join(MIXTURES)}")
        if self.normalized and self.name not in SMOOTH:
            raise UserError("normalized", f"{self.name} has no curvature to divide by", value=True,
                            way_out=f"leave it out, or use {', '.join(MIXTURES)}")
        return self


Layers = Literal["uniform", "last"] | tuple[tuple[int, int], ...]


class Features(Node):
    """Match hidden states of the student's blocks to those of the teacher's blocks (survey eq. 17; FitNets)."""

    weight: ScheduledWeight = 1.0
    """Weight in the loss, or points [fraction of the run, weight]."""
    loss: Literal["mse", "cosine"] = "mse"
    """Squared error or cosine distance per token; where widths differ, after a learned projection."""
    scale: Literal["none", "variance"] = "variance"
    """Divide squared errors by the variance of the teacher's hidden states, whose size grows with depth."""
    projections: Literal["random", "least_squares"] = "least_squares"
    """How projections begin: random, or fitted to the teacher's hidden states on the first rows."""
    layers: Layers = "uniform"
    """Layer mapping: uniform, last, or pairs [student layer, teacher layer], with blocks counted from 0."""


class Relations(Node):
    """Match distances and angles between the tokens of a sequence to the teacher's (survey eq. 18-19; RKD)."""

    distance: ScheduledWeight = 25.0
    """Weight of the distance loss, or points [fraction of the run, weight]."""
    angle: ScheduledWeight = 50.0
    """Weight of the angle loss, or points [fraction of the run, weight]."""
    layers: Layers = "last"
    """Layer mapping: uniform, last, or pairs [student layer, teacher layer], with blocks counted from 0."""
    tokens: Annotated[int, Field(ge=3)] = 16
    """Maximum number of tokens, evenly spaced in a sequence, to relate to each other."""


class ValueRelations(Node):
    """Match the relations between attention values to the teacher's (MiniLM)."""

    weight: ScheduledWeight = 1.0
    """Weight in the loss, or points [fraction of the run, weight]."""
    layers: Layers = "last"
    """Layer mapping: uniform, last, or pairs [student layer, teacher layer], with blocks counted from 0."""
    heads: Annotated[int, Field(gt=0)] = 1
    """Relation heads to split the values into; must divide the value width of both models."""


class AttentionMaps(Node):
    """Match attention maps, averaged over heads, to the teacher's (TinyBERT); both models then run eager attention."""

    weight: ScheduledWeight = 1.0
    """Weight in the loss, or points [fraction of the run, weight]."""
    layers: Layers = "uniform"
    """Layer mapping: uniform, last, or pairs [student layer, teacher layer], with blocks counted from 0."""


class OnPolicy(Node):
    """On-policy distillation (GKD): the student generates, the teacher scores; cross-entropy is on data text only."""

    fraction: ScheduledFraction = 0.5
    """Fraction of steps, chosen by seed and step, that train on student generations; or points, as for weights."""
    prompt_tokens: Annotated[int, Field(gt=0)] = 16
    """Tokens of the text that the student continues, in rows without a prompt."""
    new_tokens: Annotated[int, Field(gt=0)] = 64
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Sampling temperature of the generation."""

    @model_validator(mode="after")
    def _writes(self) -> OnPolicy:
        if not highest(self.fraction):
            raise UserError("fraction", "the student never writes", value=self.fraction,
                            way_out="use more than 0, or remove `on_policy`")
        return self


class Objective(Node):
    """The loss of the student: a weighted sum of cross-entropy, divergence from the teacher, and optional terms."""

    cross_entropy: ScheduledWeight = 1.0
    """Weight of the cross-entropy with the text (survey eq. 16), or points [fraction of the run, weight]."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability mass of each target that is spread uniformly over the vocabulary in the cross-entropy."""
    z_loss: Weight = 0.0
    """Weight of the squared log of the softmax normalizer, a penalty that keeps logits small (PaLM: 1e-4)."""
    balancing: Weight | None = None
    """Weight of the load-balancing loss of a mixture of experts; null: as in the model's configuration, 0: none."""
    divergence: Divergence = Divergence()
    """Divergence of the student's distribution from the teacher's."""
    features: Features | None = None
    """Loss on hidden states; null: none."""
    relations: Relations | None = None
    """Loss on distances and angles between tokens; null: none."""
    values: ValueRelations | None = None
    """Loss on relations between attention values; null: none."""
    attention_maps: AttentionMaps | None = None
    """Loss on attention maps; null: none."""
    early_exits: EarlyExits | None = None
    """Heads after some of the student's blocks, where easy inputs leave; null: none."""
    on_policy: OnPolicy | None = None
    """Train on the student's own generations as well; null trains on the data only."""

    @property
    def has_intermediate(self) -> bool:
        """Whether the loss needs the teacher's intermediate activations, beyond its outputs."""
        return any(getattr(self, name) is not None for name in INSIDE)

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Keys below `objective` whose value is a schedule."""
        return tuple(_scheduled(self, ""))

    def at(self, fraction: float) -> Objective:
        """The objective at a fraction of the run, with the value of the moment in place of each schedule."""
        return _with_values(self, lambda value: value_at(value, fraction))

    @property
    def planned(self) -> Objective:
        """The objective with the highest value of each schedule: it has every term that any step has."""
        return _with_values(self, highest)

    def idle_at(self, has_teacher: bool) -> float | None:
        """The fraction of the run from which on no term has a weight; None if there is always one."""
        moments = {at for key in self.scheduled for at, _ in self.value(key) if at < 1} | {0.0}
        for moment in sorted(moments):
            now = self.at(moment)
            if not now.cross_entropy and not now.z_loss and (not has_teacher or now.divergence.weight == 0):
                return moment
        return None

    def value(self, key: str) -> Any:
        """The value of a dotted key below `objective`."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def pairs(self, name: str, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) pairs of the loss `name`, one of `INSIDE`."""
        from strategies.distillation.losses.layer_map import layer_map

        asked = getattr(self, name).layers
        with error_context(
            f"objective.{name}.layers",
            value=asked if isinstance(asked, str) else list(map(list, asked)),
            way_out="use uniform, last, or pairs within both models",
        ):
            return layer_map(student_layers, teacher_layers, asked)

    def build(self, teacher: bool) -> ResponseObjective:
        """The terms with the teacher's and the text's outputs, each with its highest weight where that moves."""
        from strategies.distillation.losses.response import Divergence as Built
        from strategies.distillation.losses.response import ResponseObjective

        planned = self.planned
        asked = planned.divergence
        weight = float(teacher) if asked.weight is None else asked.weight
        with error_context("objective.divergence"):
            built = Built(asked.name, weight, asked.temperature, asked.share, bool(asked.normalized))
        return ResponseObjective(planned.cross_entropy, (built,), self.label_smoothing, self.z_loss)


def _scheduled(node: Node, prefix: str) -> Iterator[str]:
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, Node):
            yield from _scheduled(value, f"{prefix}{name}.")
        elif name in SCHEDULED and moves(value):
            yield prefix + name


def _with_values(node: Any, change: Callable[[Any], Any]) -> Any:
    """A node whose scheduled values, and those of the nodes in it, are changed."""
    values = {name: getattr(node, name) for name in type(node).model_fields}
    return node.model_copy(update={
        name: _with_values(value, change) if isinstance(value, Node) else change(value)
        for name, value in values.items() if isinstance(value, Node) or (name in SCHEDULED and moves(value))})

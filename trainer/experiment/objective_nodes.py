"""The nodes of what the student minimizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError, error_context
from trainer.experiment.node import Node, Weight

if TYPE_CHECKING:  # pragma: no cover - names for the reader, not for the interpreter
    from strategies.distillation.losses.response import ResponseObjective

INSIDE = ("features", "relations", "values", "attention_maps")  # what looks inside of the models
MIXTURES = ("jsd", "skewed_kl", "skewed_reverse_kl")


class Divergence(Node):
    """How far the student is from its teacher, token by token, and how much that counts."""

    name: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation", "uld"] = (
        "forward_kl")
    """KL(teacher || student), the reverse, a mixture, or sorted probabilities for another tokenizer (uld)."""
    weight: Weight | None = None
    """Its weight in the loss; null: 1 with a teacher, else 0."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Divides logits of both; above 1 it softens them. Values count times its square (survey eq. 15-16)."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a mixture: of the teacher in jsd (null: 0.5) and skewed_kl (0.1), of the student in the last (0.1)."""

    @model_validator(mode="after")
    def _mixes(self) -> Divergence:
        if self.share is not None and self.name not in MIXTURES:
            raise UserError("share", f"{self.name} mixes nothing", value=self.share,
                            way_out=f"leave it out, or use {', '.join(MIXTURES)}")
        return self


Layers = Literal["uniform", "last"] | tuple[tuple[int, int], ...]


class Features(Node):
    """Hidden states of the student's blocks are to be those of its teacher's (survey eq. 17; FitNets)."""

    weight: Weight = 1.0
    """Its weight in the loss."""
    loss: Literal["mse", "cosine"] = "mse"
    """Squared error, or cosine distance, of a token's hidden state; projected by a learned map where widths differ."""
    layers: Layers = "uniform"
    """Which learns from which: uniform, last, or pairs [student layer, teacher layer], blocks counted from 0."""


class Relations(Node):
    """Distances and angles between the tokens of a sequence are to be the teacher's (survey eq. 18-19; RKD)."""

    distance: Weight = 25.0
    """Weight of the distances."""
    angle: Weight = 50.0
    """Weight of the angles."""
    layers: Layers = "last"
    """Which learns from which: uniform, last, or pairs [student layer, teacher layer], blocks counted from 0."""
    tokens: Annotated[int, Field(ge=3)] = 16
    """At most so many evenly spaced tokens of a sequence are related to each other."""


class ValueRelations(Node):
    """Relations of attention values are to be the teacher's (MiniLM)."""

    weight: Weight = 1.0
    """Its weight in the loss."""
    layers: Layers = "last"
    """Which learns from which: uniform, last, or pairs [student layer, teacher layer], blocks counted from 0."""
    heads: Annotated[int, Field(gt=0)] = 1
    """Relation heads that values are cut into; must divide the width of both models' values."""


class AttentionMaps(Node):
    """Attention maps, mean over heads, are to be the teacher's (TinyBERT); both models then run eager attention."""

    weight: Weight = 1.0
    """Its weight in the loss."""
    layers: Layers = "uniform"
    """Which learns from which: uniform, last, or pairs [student layer, teacher layer], blocks counted from 0."""


class OnPolicy(Node):
    """Let the student write and its teacher judge (GKD): no target of the text is learned from what it writes."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of steps, drawn by seed and step, on what the student writes; the others are on the text."""
    prompt_tokens: Annotated[int, Field(gt=0)] = 16
    """Tokens of the text that the student goes on from, where there is no prompt."""
    new_tokens: Annotated[int, Field(gt=0)] = 64
    """Most tokens that it writes."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Temperature at which it writes."""


class Objective(Node):
    """What the student minimizes: a weighted sum of cross-entropy and the divergence from its teacher."""

    cross_entropy: Weight = 1.0
    """Weight of the cross-entropy with the text's own next token (survey eq. 16)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread over the whole vocabulary in the cross-entropy."""
    z_loss: Weight = 0.0
    """Weight of the squared logarithm of the softmax's normalizer, which keeps logits small (PaLM: 1e-4)."""
    balancing: Weight | None = None
    """Weight of the routers' balancing loss of a mixture of experts; null: what its configuration asks for, 0: none."""
    divergence: Divergence = Divergence()
    """How far the student is from its teacher."""
    features: Features | None = None
    """Hidden states as the teacher's; null compares none."""
    relations: Relations | None = None
    """Distances and angles between tokens as the teacher's; null compares none."""
    values: ValueRelations | None = None
    """Relations of attention values as the teacher's; null compares none."""
    attention_maps: AttentionMaps | None = None
    """Attention maps as the teacher's; null compares none."""
    on_policy: OnPolicy | None = None
    """Learn from what the student itself writes; null learns from the text only."""

    @property
    def has_intermediate(self) -> bool:
        """Whether the teacher is needed beyond what it says."""
        return any(getattr(self, name) is not None for name in INSIDE)

    def pairs(self, name: str, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) of one of `INSIDE`."""
        from strategies.distillation.losses.layer_map import layer_map

        asked = getattr(self, name).layers
        with error_context(
            f"objective.{name}.layers",
            value=asked if isinstance(asked, str) else list(map(list, asked)),
            way_out="use uniform, last, or pairs within both models",
        ):
            return layer_map(student_layers, teacher_layers, asked)

    def build(self, teacher: bool) -> ResponseObjective:
        from strategies.distillation.losses.response import Divergence as Built
        from strategies.distillation.losses.response import ResponseObjective

        asked = self.divergence
        weight = float(teacher) if asked.weight is None else asked.weight
        with error_context("objective.divergence"):
            built = Built(asked.name, weight, asked.temperature, asked.share)
        return ResponseObjective(self.cross_entropy, (built,), self.label_smoothing, self.z_loss)

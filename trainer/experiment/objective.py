"""The nodes of what the student minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError, blame
from trainer.experiment.node import Node, Weight

if TYPE_CHECKING:  # pragma: no cover - names for the reader, not for the interpreter
    from strategies.distillation.response import ResponseObjective

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


class Objective(Node):
    """What the student minimises: a weighted sum of cross-entropy and the divergence from its teacher."""

    cross_entropy: Weight = 1.0
    """Weight of the cross-entropy with the text's own next token (survey eq. 16)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread over the whole vocabulary in the cross-entropy."""
    z_loss: Weight = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits small (PaLM: 1e-4)."""
    divergence: Divergence = Divergence()
    """How far the student is from its teacher."""

    def build(self, teacher: bool) -> ResponseObjective:
        from strategies.distillation.response import Divergence as Built
        from strategies.distillation.response import ResponseObjective

        asked = self.divergence
        weight = float(teacher) if asked.weight is None else asked.weight
        with blame("objective.divergence"):
            built = Built(asked.name, weight, asked.temperature, asked.share)
        return ResponseObjective(self.cross_entropy, (built,), self.label_smoothing, self.z_loss)

"""Experiment nodes for adapters: a few weights that are trained beside a frozen base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.experiment.node import Node, Positive

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    from strategies.adapters.low_rank import LowRank


class Adapter(Node):
    """Low-rank adapters, by peft: the student's own weights are frozen, and two thin matrices per layer are trained."""

    kind: Literal["lora", "dora"] = "lora"
    """lora, or dora, which also learns the length of each row of a weight."""
    rank: Positive = 16
    """Columns of the two thin matrices."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """The product of the two is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's inputs that are zeroed on their way into its adapter."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Layers that get an adapter, by name or the end of it, such as q_proj; null: all linear layers except the head."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """What frozen weights are held in: 8 or 4 bits (nf4, by bitsandbytes) in layers with adapters, else bfloat16."""

    def build(self) -> LowRank:
        from strategies.adapters.low_rank import LowRank

        return LowRank(**self.model_dump())

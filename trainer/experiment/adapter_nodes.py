"""Experiment nodes for adapters: a few weights that are trained beside a frozen base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.errors import UserError
from trainer.experiment.node import Node, Positive
from trainer.experiment.quantization_nodes import Quantization

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
    base: Literal["float32", "bfloat16", "int8", "nf4", "quantized"] = "float32"
    """What frozen weights are held in: 8 or 4 bits (int8, nf4), or as student.quantization exports them (quantized)."""

    def build(self) -> LowRank:
        from strategies.adapters.low_rank import LowRank

        return LowRank(**self.model_dump())

    @property
    def is_exported(self) -> bool:
        """Whether the base is held in the very numbers that `student.quantization` exports."""
        return self.base == "quantized"


EXAMPLE = "{method: rtn, bits: 4, group_size: 64}"


def check_adapter_quantization(adapter: Adapter, asked: Quantization | None) -> None:
    """Raise `UserError` if an adapter's base cannot be quantized so, before or after training."""
    if asked is None:
        if adapter.is_exported:
            raise UserError("adapter.base", "there are no numbers to hold the base in: `student.quantization` is not "
                            "set", value=adapter.base, way_out=f"set student.quantization to {EXAMPLE}, or use nf4")
        return
    if asked.trained:
        raise UserError("quantization.method", "quantization-aware training changes weights that the adapter freezes",
                        value="qat", way_out="use rtn, or remove `adapter`" if adapter.is_exported else
                        "use rtn or gptq, which quantize what is merged, or remove `adapter`")
    if not adapter.is_exported:
        return
    way_out = "with which the student is quantized after its adapter is merged (export.adapter: merged)"
    if asked.method == "gptq":
        raise UserError("quantization.method", "gptq needs text to calibrate on, and the base of an adapter is "
                        "quantized when it is loaded", value="gptq",
                        way_out=f"use rtn, or set adapter.base to nf4, {way_out}")
    for name, value, why in (
            ("budget", asked.budget, "chooses bits by a measure on text, and the base of an adapter is quantized when "
             "it is loaded"),
            ("smooth", asked.smooth, "measures activations on text, and the base of an adapter is quantized when it is "
             "loaded"),
            ("activations", asked.activations and asked.activations.model_dump(), "are not quantized while an adapter "
             "is trained"),
            ("embeddings", asked.embeddings or None, "of an adapter's base are held in 16 bits, as linear layers alone "
             "are packed")):
        if value is not None:
            raise UserError(f"quantization.{name}", why, value=value,
                            way_out=f"leave it out, or set adapter.base to nf4, {way_out}")

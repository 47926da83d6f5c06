"""Experiment nodes for the quantization of the student: weights, activations, and per-layer exceptions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from strategies.memory.units import parse_bytes
from trainer.errors import UserError, error_context
from trainer.experiment.node import Bytes, Fraction, Node, Positive

if TYPE_CHECKING:  # pragma: no cover - imported for annotations only
    import torch

    from strategies.quantization.activations import ActivationQuantizer
    from strategies.quantization.qat import Rules
    from strategies.quantization.quantizer import WeightQuantizer

Kind = Literal["int", "ternary", "binary", "fp8"]


class QuantizedActivations(Node):
    """Quantize the input activations of quantized layers to 8 bits as well, by default with one scale per token."""

    kind: Literal["int", "fp8"] = "int"
    """Integers (int), or 8-bit floating point (fp8, e4m3)."""
    dynamic: bool = True
    """Compute one scale per token; false calibrates a single static scale, after training only (rtn, gptq)."""

    def build(self) -> ActivationQuantizer:
        from strategies.quantization.activations import ActivationQuantizer

        return ActivationQuantizer(self.kind, self.dynamic)


class QuantizedLayers(Node):
    """Layers that are quantized differently from the rest."""

    match: Annotated[str, Field(min_length=1)]
    """Name pattern (shell wildcards) of the layers."""
    kind: Kind = "int"
    """Number format of the weights, as in `kind` above."""
    bits: Literal[8, 4, 3, 2, 1] | None = None
    """Bits per weight; null: 4 for integers."""
    group_size: Positive | None = None
    """Consecutive input weights that share a scale; null: one scale per output channel."""


class Quantization(Node):
    """Low-bit weights with one scale per output channel or group, by quantization-aware or post-training methods."""

    method: Literal["qat", "rtn", "gptq"] = "qat"
    """Quantization-aware training (qat), or post-training quantization by round-to-nearest (rtn) or GPTQ (gptq)."""
    bits: Literal[8, 4, 3, 2, 1] | None = None
    """Bits per weight; null: 4 for integers, fixed by `kind` for the others."""
    kind: Kind = "int"
    """Integers (int), -1 0 1 (ternary: BitNet b1.58), -1 1 (binary: XNOR-Net), or 8-bit floating point (fp8)."""
    group_size: Positive | None = None
    """Consecutive input weights that share a scale; null: one scale per output channel."""
    per_tensor: bool = False
    """Use one scale for a whole layer."""
    symmetric: bool = True
    """Quantize symmetrically around zero; false adds a zero point to each scale."""
    positive_scales: bool = False
    """Keep symmetric scales positive, as ExecuTorch needs them; else the sign puts the largest weight on -2^(b-1)."""
    scales: Literal["minmax", "absmean", "mse", "learned"] | None = None
    """Scale by largest weight, mean magnitude, least squared error, or learned (LSQ); null: minmax, absmean by kind."""
    activations: QuantizedActivations | None = None
    """Quantize the input activations of these layers as well."""
    embeddings: bool = False
    """Quantize embeddings as well, and an output head that shares their weights."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Name patterns (shell wildcards) of layers that stay in full precision."""
    layers: tuple[QuantizedLayers, ...] = ()
    """Layers with their own settings; the first pattern that matches applies."""
    bits_schedule: tuple[tuple[Fraction, Annotated[int, Field(ge=2, le=8)]], ...] = ()
    """Start with more bits: pairs [fraction of the training, bits from there on], ending with `bits`."""

    calibration_rows: Positive = 128
    """Rows of the training data used for calibration in post-training quantization."""
    smooth: Fraction | None = None
    """SmoothQuant's alpha: moves activation outliers into the weights before these are rounded (rtn, gptq)."""
    budget: Bytes = None
    """Size of the student on disk to meet by choosing each layer's bits (rtn, gptq); null: all layers have `bits`."""
    choices: tuple[Literal[8, 4, 3, 2], ...] = (8, 4, 3, 2)
    """Bit widths that `budget` chooses from."""

    @property
    def trained(self) -> bool:
        """Whether training uses quantized weights (qat)."""
        return self.method == "qat"

    @property
    def bytes(self) -> int | None:
        """The budget for the student on disk, in bytes."""
        return None if self.budget is None else parse_bytes(self.budget)

    @property
    def parts(self) -> int:
        """Tensors stored per layer besides its packed weights: scale, shape, zero points, static input scale."""
        return 2 + (not self.symmetric) + (self.activations is not None and not self.activations.dynamic)

    @model_validator(mode="after")
    def _one_way(self) -> Quantization:
        after = {"smooth": self.smooth is not None, "budget": self.budget is not None,
                 "activations.dynamic": self.activations is not None and not self.activations.dynamic}
        for name, asked in after.items():
            if self.trained and asked:
                raise UserError(name, "is for a student that is quantized after training",
                                way_out="set `method` to rtn or gptq, or leave it out")
        for name, asked in {"bits_schedule": bool(self.bits_schedule), "scales": self.scales == "learned"}.items():
            if not self.trained and asked:
                raise UserError(name, f"{self.method} quantizes after training, where nothing is learned",
                                way_out="set `method` to qat, or leave it out")
        if self.positive_scales and not self.symmetric:
            raise UserError("positive_scales", "scales beside zero points are positive anyway",
                            way_out="leave it out, or set `symmetric` to true")
        if self.budget is not None and (self.kind != "int" or self.layers):
            raise UserError("budget", "chooses the bits of all layers, of whole numbers", value=self.budget,
                            way_out="leave `kind` and `layers` out")
        return self

    @model_validator(mode="after")
    def _known(self) -> Quantization:
        import torch

        with error_context("scales" if self.scales else "bits", value=self.scales or self.bits,
                   way_out="see `kind` and `scales` in --help"):
            own = self.build(torch.float32)
        with error_context(
            "layers", value=[layers.model_dump() for layers in self.layers], way_out="see `kind` in --help"
        ):
            self.rules(torch.float32)
        shares, bits = [share for share, _ in self.bits_schedule], [bits for _, bits in self.bits_schedule]
        if bits and (self.kind != "int" or shares[0] != 0 or shares != sorted(set(shares)) or bits[-1] != own.bits):
            raise UserError("bits_schedule", "a schedule begins at share 0, rises, and ends with the bits that are "
                            f"exported ({own.bits})", value=[list(pair) for pair in self.bits_schedule],
                            way_out=f"for example [[0, 8], [0.5, {own.bits}]], of whole numbers")
        return self

    def build(self, scale_dtype: torch.dtype) -> WeightQuantizer:
        from strategies.quantization.quantizer import WeightQuantizer

        return WeightQuantizer(self.bits, self.group_size, scale_dtype, self.kind, self.symmetric, self.scales,
                               self.per_tensor, self.positive_scales)

    def candidates(self, scale_dtype: torch.dtype) -> list[WeightQuantizer]:
        """Quantizers that `budget` chooses from, one for each bit width in `choices`."""
        return [replace(self.build(scale_dtype), bits=bits) for bits in self.choices]

    def rules(self, scale_dtype: torch.dtype) -> Rules:
        """(name pattern, quantizer) of each entry in `layers`."""
        from strategies.quantization.quantizer import RULES, WeightQuantizer

        return [(layers.match, WeightQuantizer(
            layers.bits, layers.group_size, scale_dtype, layers.kind, self.symmetric or layers.kind != "int",
            self.scales if self.scales in RULES[layers.kind] else None, positive=self.positive_scales))
            for layers in self.layers]

    def bits_at(self, step: int, steps: int) -> int | None:
        """Bit width at a step, or None without a `bits_schedule`."""
        begun = [bits for share, bits in self.bits_schedule if step >= share * steps]
        return begun[-1] if begun else None

    def has_final_bits(self, step: int, steps: int) -> bool:
        """Whether layers have the bits of the exported student at a step; a `bits_schedule` may give them more yet."""
        return self.bits_at(step, steps) in (None, self.bits_schedule[-1][1] if self.bits_schedule else None)

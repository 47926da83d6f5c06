"""Layers that torch traces in place of quantized ones, with the numbers and scales of training, as XNNPACK takes them.

XNNPACK multiplies 8-bit activations, whose scale and zero point are computed for each token, with symmetric weights: of
4 bits with a bfloat16 scale for each group of a multiple of 32 inputs, or of 4 or 8 bits with an fp32 scale for each
output. It refuses scales that are not positive, when it loads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from strategies.export.quantized_layers import Quantized, Quantizer

OPS = torch.ops.quantized_decomposed
GROUP = 32  # XNNPACK's groups are a multiple of it


@dataclass(frozen=True)
class Stored:
    """How XNNPACK stores a weight: integers of 4 or 8 bits, with a scale for each group, or (None) for each output."""

    bits: int
    group_size: int | None = None

    @property
    def lowest(self) -> int:
        """The smallest number."""
        return -2 ** (self.bits - 1)

    @property
    def highest(self) -> int:
        """The largest number."""
        return 2 ** (self.bits - 1) - 1


def multiplied(layer: Quantized) -> bool:
    """Whether XNNPACK multiplies a layer's numbers; the rest has dequantized weights in its program."""
    return layer.activations is not None


def stored_as(name: str, layer: Quantized) -> Stored:
    """The form in which XNNPACK holds the numbers of a linear layer with quantized activations.

    Only the quantizer is looked at: whether a scale will be negative is not known before training. Numbers of such a
    scale change their sign, so that -2^(b-1), the largest weight, needs one bit more.

    Raises:
        ValueError: there is none.
    """
    quantizer, inputs = layer.quantizer, layer.weight.shape[1]
    if quantizer.kind == "fp8" or not quantizer.symmetric:
        what = "fp8 numbers" if quantizer.kind == "fp8" else "zero points"
        raise ValueError(f"{name} has {what} and quantized activations, whose product XNNPACK does not have: take "
                         "symmetric integers")
    signed = quantizer.kind == "int" and not quantizer.positive
    largest = -quantizer.lowest if signed else quantizer.highest
    group = None if quantizer.group_size == inputs else quantizer.group_size
    if group is not None:
        _check_groups(name, quantizer, group, largest)
        return Stored(4, group)
    # With 4 bits and an odd number of inputs XNNPACK multiplies wrongly.
    if largest <= 7 and inputs % 2 == 0:
        return Stored(4)
    if largest > 127:
        raise ValueError(f"{name} has scales of both signs, and XNNPACK takes positive ones: set `positive_scales: "
                         "true` in `quantization`")
    return Stored(8)


def _check_groups(name: str, quantizer: Quantizer, group: int, largest: int) -> None:
    if group % GROUP:
        raise ValueError(f"{name} has groups of {group}, and XNNPACK those of a multiple of {GROUP}: take {GROUP}, or "
                         "whole channels")
    if quantizer.bits > 4:
        raise ValueError(f"{name} has groups of {quantizer.bits}-bit numbers, and XNNPACK has groups of 4 bits: take 4 "
                         "bits, or whole channels (`group_size: null`)")
    if largest > 7:
        raise ValueError(f"{name} has scales of both signs, and XNNPACK takes positive ones: set `positive_scales: "
                         "true` in `quantization`, or take whole channels (`group_size: null`)")
    if quantizer.scale_dtype is not torch.bfloat16:
        raise ValueError(f"{name} has groups with scales in {str(quantizer.scale_dtype).removeprefix('torch.')}, which "
                         "XNNPACK rounds to bfloat16: set `export.dtype: bfloat16`, or take whole channels "
                         "(`group_size: null`)")


def positive(layer: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (outputs, inputs) in int16 and positive fp32 scales (outputs, groups) of a symmetric layer."""
    numbers, scale = layer.numbers().to(torch.int16), layer.grid().scale.detach().float()
    scale = scale.expand(numbers.shape[0], -1)
    groups = numbers.unflatten(1, (scale.shape[1], -1))
    return (groups * scale.sign().to(torch.int16)[..., None]).flatten(1), scale.abs()


class XnnpackLinear(nn.Module):
    """A linear layer of quantized activations and weights, in the operators that XNNPACK recognizes.

    Args:
        name: the layer's, for messages.
        layer: it, whose tensors are not shared.
        bias: as it is exported.
    """

    def __init__(self, name: str, layer: Quantized, bias: torch.Tensor | None) -> None:
        super().__init__()
        import_module("torch.ao.quantization.fx._decomposed")  # defines the operators
        self.form = stored_as(name, layer)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        numbers, scale = positive(layer)
        if numbers.amin() < self.form.lowest or numbers.amax() > self.form.highest:
            raise ValueError(f"{name} has numbers that {self.form.bits} bits do not hold beside positive scales")
        scale = scale.contiguous() if self.form.group_size else scale[:, 0].contiguous()
        self.register_buffer("numbers", numbers.to(torch.int8).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int8 if self.form.group_size else torch.int64))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        bounds, form = (-128, 127, torch.int8), self.form
        scale, zero = OPS.choose_qparams_per_token_asymmetric(values, torch.int8)
        rounded = OPS.quantize_per_token(values, scale, zero, *bounds)
        values = OPS.dequantize_per_token(rounded, scale, zero, *bounds, torch.float32)
        grid = (self.numbers, self.scale, self.zero)
        if form.group_size:
            weight = OPS.dequantize_per_channel_group(*grid, form.lowest, form.highest, torch.int8, form.group_size,
                                                      torch.float32)
        else:
            weight = OPS.dequantize_per_channel(*grid, 0, form.lowest, form.highest, torch.int8)
        return nn.functional.linear(values, weight, self.bias)


class Rows(nn.Module):
    """An embedding that is stored in int8, with its scales and zero points."""

    def __init__(self, layer: Quantized) -> None:
        super().__init__()
        grid, rows = layer.grid(), len(layer.weight)
        self.register_buffer("numbers", layer.numbers().to(torch.int8).contiguous())
        self.register_buffer("scale", grid.scale.detach().float().expand(rows, -1).contiguous())
        zero = torch.zeros(1, 1) if grid.zero_point is None else grid.zero_point.detach().float()
        self.register_buffer("zero", None if not zero.any() else zero.expand(rows, -1).contiguous())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        scale = nn.functional.embedding(ids, self.scale)
        groups = nn.functional.embedding(ids, self.numbers).float().unflatten(-1, (scale.shape[-1], -1))
        if self.zero is not None:
            groups = groups - nn.functional.embedding(ids, self.zero)[..., None]
        return (groups * scale[..., None]).flatten(-2)


class HalfRows(nn.Module):
    """An embedding that is stored in half precision."""

    def __init__(self, layer: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("table", layer.weight.detach().to(dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        return nn.functional.embedding(ids, self.table).float()

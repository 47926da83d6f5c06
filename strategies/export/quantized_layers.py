"""The interface of quantized layers that exports rely on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Parameters that quantization adds to a layer.
ADDED = ("first_ratio", "log_ratio", "scale", "zero_point", "input_scale")


class Quantizer(Protocol):
    """The quantizer that a layer was trained with, which determines how its quantized integers are read."""

    kind: str
    bits: int
    group_size: int | None
    per_tensor: bool
    symmetric: bool
    positive: bool
    scale_dtype: torch.dtype
    lowest: int
    highest: int


class Activations(Protocol):
    """The quantizer of a layer's inputs."""

    kind: str
    bits: int
    dynamic: bool


class Grid(Protocol):
    """Scales (outputs, groups), and zero points of that shape or None: w = scale * (q - zero_point)."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None


class Quantized(Protocol):
    """A quantized layer after training, whose quantized integers and scales are exported unchanged."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    quantizer: Quantizer
    activations: Activations | None
    input_scale: torch.Tensor  # if activations are not dynamic

    @property
    def matrix(self) -> torch.Tensor: ...

    def grid(self) -> Grid: ...

    def numbers(self) -> torch.Tensor: ...


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Yield all quantized layers of a model with their names, including each of those that share a weight.

    The weights of experts that a single module holds count as layers too, under the names of their parameters.
    """
    for name, module in model.named_modules():
        if hasattr(module, "quantizer"):
            yield name, module
        for key, experts in getattr(module, "quantized_experts", {}).items():
            yield f"{name}.{key}", experts


def weight_count(model: nn.Module) -> int:
    """Number of a model's weights, tied ones once, without the scales and zero points of quantized layers."""
    added = {id(getattr(layer, part, None)) for _, layer in quantized_layers(model) for part in ADDED}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in added)


def is_module(layer: Quantized) -> bool:
    """Whether a layer is a module, rather than one of several weights that a module holds."""
    return isinstance(layer, nn.Module)


def weight_name(name: str, layer: Quantized) -> str:
    """The name of a layer's weight in a state dict."""
    return f"{name}.weight" if is_module(layer) else name


def part_name(name: str, layer: Quantized, part: str) -> str:
    """The name in a state dict of a tensor that quantization added to a layer."""
    return f"{name}.{part}" if is_module(layer) else f"{name}_{part}"


def is_turned(layer: Quantized) -> bool:
    """Whether a module stores its matrix transposed, (inputs, outputs), as GPT-2's Conv1D does."""
    return isinstance(layer, Conv1D)

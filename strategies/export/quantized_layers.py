"""What exports ask of a quantized layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Quantizer(Protocol):
    """What is asked of the quantizer that trained a layer: how its numbers are to be read."""

    kind: str
    bits: int
    group_size: int | None
    per_tensor: bool
    symmetric: bool
    scale_dtype: torch.dtype
    lowest: int
    highest: int


class Activations(Protocol):
    """What is asked of what quantizes a layer's inputs."""

    kind: str
    bits: int
    dynamic: bool


class Grid(Protocol):
    """Scales (outputs, groups), and zero points of that shape or None: w = scale * (q - zero_point)."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None


class Quantized(Protocol):
    """A layer as training leaves it: its numbers and scales are written as they are."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    quantizer: Quantizer
    activations: Activations | None
    input_scale: torch.Tensor  # where activations are not dynamic

    @property
    def matrix(self) -> torch.Tensor: ...

    def grid(self) -> Grid: ...

    def numbers(self) -> torch.Tensor: ...


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Every quantized layer of a model with its name; of layers that share a weight, each.

    Weights of experts that one module holds are layers, too, with the name of their parameter.
    """
    for name, module in model.named_modules():
        if hasattr(module, "quantizer"):
            yield name, module
        for key, experts in getattr(module, "quantized_experts", {}).items():
            yield f"{name}.{key}", experts


def is_module(layer: Quantized) -> bool:
    """Whether a layer is a module, and not one weight of several that a module holds."""
    return isinstance(layer, nn.Module)


def weight_name(name: str, layer: Quantized) -> str:
    """The name that a layer's weight has in a state dict."""
    return f"{name}.weight" if is_module(layer) else name


def part_name(name: str, layer: Quantized, part: str) -> str:
    """The name that something has in a state dict that quantization added to a layer."""
    return f"{name}.{part}" if is_module(layer) else f"{name}_{part}"


def is_turned(layer: Quantized) -> bool:
    """Whether a module keeps its matrix (inputs, outputs), as GPT-2's Conv1D does."""
    return isinstance(layer, Conv1D)

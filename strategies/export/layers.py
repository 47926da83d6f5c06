"""What exports ask of a quantised layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn


class Quantizer(Protocol):
    """What is asked of the quantiser that trained a layer: how its numbers are to be read."""

    kind: str
    bits: int
    group_size: int | None
    per_tensor: bool
    symmetric: bool
    scale_dtype: torch.dtype
    lowest: int
    highest: int


class Activations(Protocol):
    """What is asked of what quantises a layer's inputs."""

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

    def grid(self) -> Grid: ...

    def numbers(self) -> torch.Tensor: ...


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Every quantised layer of a model with its name; of layers that share a weight, each."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "quantizer"))

"""Activation quantization: round a layer's inputs as the inference runtime will."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from strategies.quantization.quantizer import FP8


@dataclass(frozen=True)
class ActivationQuantizer:
    """Symmetric 8-bit activations, with a dynamic scale for each token or one static scale for all.

        int8: scale = max|x| / 127.5, q in [-128, 127]        fp8: scale = max|x| / 448, q in e4m3

    This is what loaders of compressed-tensors files compute, in the dtype of the activations.

    Attributes:
        kind: the type of numbers.
        dynamic: whether the scale is computed for each token; otherwise it is calibrated beforehand.
    """

    kind: Literal["int", "fp8"] = "int"
    dynamic: bool = True

    @property
    def bits(self) -> int:
        """Bits per number."""
        return 8

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number."""
        return (-128.0, 127.0) if self.kind == "int" else (-448.0, 448.0)

    @property
    def half(self) -> float:
        """Divisor that turns the largest magnitude into the scale."""
        return 127.5 if self.kind == "int" else 448.0

    def scale(self, largest: torch.Tensor) -> torch.Tensor:
        """The scale for a largest magnitude; where that is zero, the dtype's epsilon."""
        scale = largest / self.half
        return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)

    def fake_quantize(self, values: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Values (..., width) as the layer will see them; gradients pass where nothing was clipped.

        Args:
            values: (..., width).
            scale: a calibrated scale, a single number, for activations that are not dynamic.
        """
        with torch.no_grad():
            if self.dynamic:
                scale = self.scale(values.detach().abs().amax(-1, keepdim=True))
            else:
                assert scale is not None, "a static scale is calibrated before it is used"
            lowest, highest = self.bounds
            ratio = values.detach() / scale
            outside = None
            if not self.dynamic:
                outside = (ratio < lowest - 0.5) | (ratio > highest + 0.5)
            ratio = ratio.clamp_(lowest, highest)
            ratio = ratio.round_() if self.kind == "int" else ratio.to(FP8).to(values.dtype)
            rounded = ratio.to(scale.dtype).mul_(scale).to(values.dtype)
        return _Clipped.apply(values, rounded, outside)


class _Clipped(torch.autograd.Function):
    """Rounded values, with the gradient of clipping (survey eq. 12)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(outside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        outside, = ctx.saved_tensors
        return (gradient if outside is None else gradient.masked_fill(outside, 0.0)), None, None

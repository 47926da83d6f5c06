"""Quantized activations: what enters a layer, rounded as the runtime will round it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from strategies.quantization.quantizer import FP8


@dataclass(frozen=True)
class ActivationQuantizer:
    """Symmetric 8-bit activations, with a scale for each token that follows from it, or one scale for all.

        int8: scale = max|x| / 127.5, q in [-128, 127]        fp8: scale = max|x| / 448, q in e4m3

    which is what readers of compressed-tensors files compute, in the dtype of the activations.

    Attributes:
        kind: the numbers.
        dynamic: whether the scale follows from each token; else it is calibrated, and given.
    """

    kind: Literal["int", "fp8"] = "int"
    dynamic: bool = True

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number."""
        return (-128.0, 127.0) if self.kind == "int" else (-448.0, 448.0)

    @property
    def half(self) -> float:
        """What the largest magnitude is divided by."""
        return 127.5 if self.kind == "int" else 448.0

    def scale(self, largest: torch.Tensor) -> torch.Tensor:
        """The scale for a largest magnitude; where there is nothing, the smallest step of the dtype."""
        scale = largest / self.half
        return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)

    def fake_quantize(self, values: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Values (..., width) as the layer will see them; the gradient passes where nothing was clipped.

        Args:
            scale: a calibrated one, of a single number, for activations that are not dynamic.
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
    """Rounded values, whose gradient is that of clipping (survey eq. 12)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(outside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        outside, = ctx.saved_tensors
        return (gradient if outside is None else gradient.masked_fill(outside, 0.0)), None, None

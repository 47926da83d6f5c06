"""Gradients through rounding: the straight-through estimator, and the gradient of a learned scale."""

from __future__ import annotations

from typing import Any

import torch


class StraightThrough(torch.autograd.Function):
    """Fake quantization whose backward is the identity.

    Eq. 12 of the survey zeroes the gradient of clipped weights. A scale computed from the weights leaves none outside
    the range, or half a step, and weights that are outside should be able to come back; so nothing is zeroed, and
    nothing is saved for it.

    This is an explicit function because `w + (w_hat - w).detach()` rounds and would differ from the export. It is given
    the rounded weight because torch.compile of torch 2.11 loses the gradient if `forward` detaches.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class LearnedScale(torch.autograd.Function):
    """Fake quantization with a gradient for its scale too (LSQ, Esser et al. 2020, eq. 3).

    With r = w / scale, and q the number that r + zero_point is rounded to:

        d w_hat / d scale = (q - zero_point) - r where r + zero_point is within the numbers, else q - zero_point

    The scale is `ratio` times a scale computed from the weights, which is therefore d scale / d ratio. Weights get the
    identity's gradient, as under every rule: clipped weights must be able to shrink, or their range never would. (LSQ's
    own choice, an absolute scale and no gradient where clipped, was tried: see docs/log.md.)

    Only tensors that exist anyway are saved for the backward.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ratio: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor,
                zero_point: torch.Tensor | None, quantizer: Any) -> torch.Tensor:
        ctx.save_for_backward(weight, ratio, scale, zero_point)
        ctx.quantizer = quantizer
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, ratio, scale, zero_point = ctx.saved_tensors
        by_scale = ctx.quantizer.gradient_of_scale(weight, scale, zero_point, gradient)
        return gradient, by_scale * (scale.float() / ratio), None, None, None, None

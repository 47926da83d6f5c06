"""The quantiser: one object that fake-quantises in training and makes the integers that are exported."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightQuantizer:
    """Symmetric integer quantisation of a weight matrix, one scale per output channel or per group of inputs.

    With q_max = 2^(bits-1) - 1 and w a channel's or group's weights (survey eq. 11, zero point 0):

        scale = max|w| / q_max        q = round(w / scale)        w_hat = scale * q

    The scale is rounded to `scale_dtype` before it is used, so that training sees the scale that is stored.

    Attributes:
        bits: 8 or 4.
        group_size: neighbouring inputs that share a scale; None for a whole output channel.
        scale_dtype: dtype the scale is stored in.
    """

    bits: int = 4
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"weights can have 4 or 8 bits, not {self.bits}")

    @property
    def largest(self) -> int:
        """Largest integer, 2^(bits-1) - 1; the smallest used is its negative."""
        return 2 ** (self.bits - 1) - 1

    def check(self, weight: torch.Tensor, name: str = "weight") -> None:
        """Raise `ValueError` if `weight` (outputs, inputs) cannot be quantised."""
        if weight.ndim != 2:
            raise ValueError(f"{name}: only matrices are quantised, this has shape {tuple(weight.shape)}")
        if self.group_size and weight.shape[1] % self.group_size:
            raise ValueError(f"{name}: groups of {self.group_size} do not divide its {weight.shape[1]} inputs")

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales (outputs, groups) of a weight (outputs, inputs), in `scale_dtype`.

        A group of zeros gets scale 1: it has nothing to scale, and 0 would divide by zero. So does a group so
        small that its scale vanishes in `scale_dtype`.
        """
        largest = self._grouped(weight.detach()).abs().amax(-1).float()
        scale = (largest / self.largest).to(self.scale_dtype)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def integers(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """q as int8, shape of `weight`, in [-q_max, q_max]."""
        return self._rounded(weight, scale).to(torch.int8)

    def dequantize(self, integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """scale * q, shape of `integers`."""
        return self._product(integers.to(scale.dtype), scale).to(dtype)

    def fake_quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """`dequantize(integers(weight))` with the gradient of the identity (straight-through; survey eq. 12)."""
        with torch.no_grad():
            scale = self.scale(weight)
            rounded = self._product(self._rounded(weight, scale).to(scale.dtype), scale).to(weight.dtype)
        return _StraightThrough.apply(weight, rounded)

    def _rounded(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ratio = self._grouped(weight.detach()).float() / scale.float().unsqueeze(-1)
        # The clamp matters where rounding the scale down to `scale_dtype` pushed the largest weight past q_max.
        return ratio.round().clamp(-self.largest, self.largest).reshape(weight.shape)

    def _product(self, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (self._grouped(integers) * scale.unsqueeze(-1)).reshape(integers.shape)

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """(outputs, inputs) -> (outputs, groups, inputs per group)"""
        return weight.unflatten(1, (-1, self.group_size or weight.shape[1]))


class _StraightThrough(torch.autograd.Function):
    """Fake quantisation whose backward is the identity.

    Eq. 12 zeroes the gradient of clipped weights; a scale from the largest weight clips none, so nothing is saved
    for backward. An explicit function, because `w + (w_hat - w).detach()` rounds and would differ from the export; and
    one that is handed what is rounded, because torch.compile of torch 2.11 loses the gradient where `forward` detaches.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None

"""Output heads, and matrix products with them in fp32 precision whatever the dtype of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from strategies.common.cpu_products import faster_fp32_products

SLAB = 8 * 2**20  # bytes of a head's weights that are converted to a wider dtype at a time


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `cap tanh(scale (hidden weight^T + bias) / cap)`.

    Attributes:
        weight: (vocabulary, width).
        bias: (vocabulary,), or None.
        scale: factor on the logits.
        cap: soft cap on the logits (Gemma Team 2024, section 2); None for no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"a head's weight is (vocabulary, width), not {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"a head over {self.weight.shape[0]} tokens has as many biases, not "
                             f"{tuple(self.bias.shape)}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"the soft cap of a head is above zero, not {self.cap}")

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it gives logits for."""
        return self.weight.shape[0]

    def detached(self) -> Head:
        """The same head, detached from the autograd graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def fill(self, out: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Write the head's products with hidden states (rows, width), before `shape`, to `out` (rows, vocabulary)."""
        if out.is_cuda and self.weight.dtype == hidden.dtype and hidden.element_size() == 2:
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for part, weight in slabs(self.weight, out.dtype):
                torch.mm(hidden, weight.T, out=out[:, part])
        return out if self.bias is None else out.add_(self.bias)

    def shape(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from products: apply scale and soft cap."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)

    def unshape_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn the gradient with respect to the logits into that with respect to the products, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


def slabs(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Weights (vocabulary, width) in a wider dtype, a slab of rows at a time in one buffer; as they are if no wider."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    rows = max(1, SLAB // (dtype.itemsize * weight.shape[1]))
    buffer = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=dtype, device=weight.device)
    for begin in range(0, len(weight), rows):
        part = slice(begin, min(begin + rows, len(weight)))
        yield part, buffer[:part.stop - begin].copy_(weight[part])


@contextmanager
def products_of(compute: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the context, matrix products of fp32 tensors read their operands as `compute` and accumulate in fp32.

    On a CPU, the product of two bf16 tensors is itself bf16, which loses the difference between two models that are
    close. But oneDNN can be set to round fp32 operands to bf16 as it reads them: values that are already bf16 lose
    nothing by that, and nothing is copied.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if device.type != "cpu" or compute is not torch.bfloat16:
        with torch.autocast(device.type, enabled=False), faster_fp32_products(device):
            yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        settings.fp32_precision = before

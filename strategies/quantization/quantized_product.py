"""Products with fake-quantized weights that keep the weight for the backward, and not its quantized copy.

Autograd would save the copy from forward to backward, for every layer at once. Here the backward quantizes again, with
the scales of the forward, which takes time in proportion to the weights and not to the tokens; one layer's copy is
there at a time. Values and gradients have the bits of torch's own products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from strategies.quantization.quantizer import Grid, WeightQuantizer

_LINEAR = nn.functional.linear  # DeepSpeed's stage 3 puts another function in its place


class QuantizedProduct(torch.autograd.Function):
    """`x W_hat^T + bias` (rows, outputs), for W_hat a fake-quantized weight; gradients as in `straight_through`.

    Args of `apply`:
        x: (rows, inputs), whose dtype is that of the product.
        weight: (outputs, inputs), or (inputs, outputs) if `turned`, in any dtype.
        ratio: (outputs, groups) of a learned scale to the covering one, which gets a gradient; else None.
        bias: (outputs,) in the dtype of `x`, or None.
        scale, zero_point: the grid (outputs, groups).
        quantizer: of the weight.
        turned: whether the weight is stored as GPT-2 does.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, ratio: torch.Tensor | None, bias: torch.Tensor | None,
                scale: torch.Tensor, zero_point: torch.Tensor | None, quantizer: WeightQuantizer, turned: bool
                ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, ratio, scale, zero_point)
        ctx.form = quantizer, turned
        factor = _factor(weight, ratio, Grid(scale, zero_point), quantizer, turned, x.dtype)
        return x.mm(factor) if bias is None else torch.addmm(bias, x, factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, ratio, scale, zero_point = ctx.saved_tensors
        quantizer, turned = ctx.form
        by_x = by_weight = by_ratio = None
        if ctx.needs_input_grad[0]:
            factor = _factor(weight, ratio, Grid(scale, zero_point), quantizer, turned, x.dtype)
            by_x = factor.mm(gradient.t()).t() if _by_column(x) else gradient.mm(factor.t())
            del factor
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # As autograd does for a matrix in this layout, since sums in another order have other bits.
            by_weight = (x.t().mm(gradient) if turned else gradient.t().mm(x)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            assert by_weight is not None and ratio is not None
            matrices = (weight.T, by_weight.T) if turned else (weight, by_weight)
            by_scale = quantizer.gradient_of_scale(matrices[0], scale, zero_point, matrices[1])
            by_ratio = by_scale * (scale.float() / ratio)
        return by_x, by_weight, by_ratio, gradient if ctx.needs_input_grad[3] else None, None, None, None, None


def _factor(weight: torch.Tensor, ratio: torch.Tensor | None, grid: Grid, quantizer: WeightQuantizer, turned: bool,
            dtype: torch.dtype) -> torch.Tensor:
    """The quantized weight (inputs, outputs) in a dtype, in memory as a plain layer would have it."""
    matrix = weight.T if turned else weight
    # With gradients only where they are differentiated again.
    made = quantizer.fake_quantize(matrix, ratio, grid) if torch.is_grad_enabled() else quantizer.rounded(matrix, grid)
    return made.T.contiguous().to(dtype) if turned else made.to(dtype).t()


def _by_column(matrix: torch.Tensor) -> bool:
    """Whether a matrix lies in memory column by column: torch then computes its gradient in this layout."""
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


def serves(weight: torch.Tensor) -> bool:
    """Whether products with a weight are to be computed here: it is trained, and torch.compile does not trace."""
    return (torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
            and not weight.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(weight))


def quantized_product(x: torch.Tensor, weight: torch.Tensor, ratio: torch.Tensor | None, bias: torch.Tensor | None,
                      grid: Grid, quantizer: WeightQuantizer, turned: bool = False) -> torch.Tensor:
    """`x W_hat^T + bias` (..., outputs) for x (..., inputs), in autocast's dtype; see `QuantizedProduct`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
        x, bias = x.to(compute), None if bias is None else bias.to(compute)
    # Elsewhere torch adds the bias after the product, which rounds once more.
    within = turned or x.ndim == 2 or x.is_contiguous() and nn.functional.linear is _LINEAR
    learned = ratio if ratio is not None and ratio.requires_grad else None
    rows = QuantizedProduct.apply(x.reshape(-1, x.shape[-1]), weight, learned, bias if within else None, *grid,
                                  quantizer, turned)
    product = rows.view(*x.shape[:-1], rows.shape[-1])
    return product if within or bias is None else product + bias

"""What ExecuTorch computes with XNNPACK, in torch: it rounds what enters a quantized matrix with a zero point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from strategies.export.executorch.executorch_layers import multiplied
from strategies.export.gguf.gguf_file import dequantized_reference
from strategies.export.quantized_layers import quantized_layers

LOWEST, HIGHEST = -128, 127
NUDGE = 2e-7  # relative, of embeddings: about what sums of fp32 in another order differ by


def executorch_reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain fp32 copy of a model with the weights of its program, which rounds activations as XNNPACK does.

    Weights are scale * (q - zero_point) in fp32; what is not quantized is rounded to `dtype`. Training rounds
    activations symmetrically, as other runtimes do, and not to these values.
    """
    reference = dequantized_reference(model, dtype)
    for name, layer in quantized_layers(model):
        if multiplied(layer):
            reference.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs: (rounded_with_zero_point(inputs[0]),))
    return reference


@contextmanager
def nudged(reference: nn.Module) -> Iterator[None]:
    """Within the context, a model's embeddings are off by as little as sums of fp32 in another order.

    Rounded activations amplify this: where a number falls on the next integer, those after it do, too. How far logits
    move is how exactly anything can be said of the model, on whatever runtime.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: nn.Module, __: tuple, rows: torch.Tensor) -> torch.Tensor:
        return rows * (1 + NUDGE * torch.randn(rows.shape, generator=generator)).to(rows)

    handle = reference.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def rounded_with_zero_point(values: torch.Tensor) -> torch.Tensor:
    """Values (..., width) on a grid of 8 bits for each token, from its smallest to its largest number, and 0.

    As XNNPACK's `qdint8` does: the zero point is rounded at the end of the range at which this errs less.
    """
    least, most = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / (HIGHEST - LOWEST)).clamp(min=torch.finfo(values.dtype).eps)
    low, high = LOWEST + least / scale, HIGHEST + most / scale
    zero = torch.where(low + high > 0, LOWEST - least / scale, HIGHEST - most / scale)
    zero = zero.clamp(LOWEST, HIGHEST).round()
    return ((values / scale).round() + zero).clamp(LOWEST, HIGHEST).sub(zero).mul(scale)

"""What llama.cpp computes with a GGUF file on a CPU, in torch: it rounds what enters a matrix to the matrix's type."""

from __future__ import annotations

import torch
from torch import nn

from strategies.export.gguf.gguf_blocks import block_for
from strategies.export.gguf.gguf_file import dequantized_reference
from strategies.export.quantized_layers import quantized_layers

SHORT, LONG = 32, 256  # neighbors that share a scale in ggml's Q8_0 and Q8_K
LEVELS = 127


def rounded_reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`dequantized_reference`, whose linear layers round their inputs as llama.cpp does on a CPU.

    With quantized weights inputs have 8 bits, with half-precision ones they are rounded to the weights' dtype
    (`vec_dot_type` of ggml's types). Keys, values and attention stay in float32.
    """
    reference = dequantized_reference(model, dtype)
    blocks = {id(layer.weight): LONG if layer_type.weights == LONG else SHORT
              for name, layer in quantized_layers(model) for layer_type in [block_for(layer, name)]}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            round_inputs(reference.get_submodule(name), blocks.get(id(layer.weight), dtype))
    return reference


def round_inputs(layer: nn.Module, to: int | torch.dtype) -> None:
    """Have a layer round its input, in place.

    Args:
        to: a dtype, or how many neighbors share a scale of 8-bit numbers: 32 as in ggml's Q8_0, or 256 as in Q8_K.
    """
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].to(to).float() if isinstance(to, torch.dtype) else _eight_bits(inputs[0], to),)

    if to is not torch.float32:
        layer.register_forward_pre_hook(hook)


def _eight_bits(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values (..., inputs) on a grid of 8 bits with a scale for each `size` neighbors.

    Q8_0 keeps its scale in half precision, and Q8_K gives the largest number the sign of a minus.
    """
    groups = values.unflatten(-1, (-1, size))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    extreme = torch.where(extreme == 0, 1e-30, extreme)  # a group of zeros has no scale
    inverse = -LEVELS / extreme if size == LONG else LEVELS / extreme.abs()
    scale = 1 / inverse if size == LONG else (extreme.abs() / LEVELS).half().float()
    return (groups * inverse).round().clamp(max=LEVELS).mul(scale).flatten(-2)

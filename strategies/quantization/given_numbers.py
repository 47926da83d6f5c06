"""The numbers of a weight apart from it: packed, as a frozen base is held in training, and given back to a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from strategies.common.packed_codes import pack, unpack, width_of
from strategies.common.stored_weights import as_matrix
from strategies.quantization.qat import become_quantized
from strategies.quantization.quantizer import Grid, WeightQuantizer, without_data

FLOATS = "float8"  # how numbers of the kind fp8 are held


@torch.no_grad()
def packed_numbers(quantizer: WeightQuantizer, weight: torch.Tensor) -> tuple[str, tuple[torch.Tensor, ...]]:
    """Round a weight (outputs, inputs) to nearest, as `post_training.quantize` does with `rtn`, and pack its numbers.

    Returns:
        How they are held, `packed2`, `packed4`, `packed8` or `float8`, and: the numbers, (outputs, bytes) uint8 or
        (outputs, inputs) float8; scales (outputs, groups); and unless they are float8 what counts as zero, uint8
        (outputs, groups), or (1, 1) for all. A weight is scale * (number - zero).
    """
    weight = weight.detach().float()
    if without_data(weight):  # shapes need no search
        quantizer = replace(quantizer, rule="absmean" if quantizer.kind in ("ternary", "binary") else "minmax")
    grid = quantizer.grid(weight)
    numbers = quantizer.numbers(weight, grid)
    if quantizer.kind == "fp8":
        return FLOATS, (numbers, grid.scale)
    width = width_of(max(2, quantizer.bits or 0))
    codes = (numbers.to(torch.int16) - quantizer.lowest).to(torch.uint8)
    zero = torch.full((1, 1), -quantizer.lowest, device=weight.device) if grid.zero_point is None else \
        grid.zero_point - quantizer.lowest
    return f"packed{width}", (pack(codes, width), grid.scale, zero.to(torch.uint8))


@torch.no_grad()
def hold_numbers(layer: Any, quantizer: WeightQuantizer, numbers: torch.Tensor, scale: torch.Tensor,
                 zero: torch.Tensor | None = None) -> None:
    """Turn a plain layer, in place, into a quantized one with exactly these numbers; see `packed_numbers`."""
    grid = Grid(scale)
    if zero is None:
        found = numbers.float()
    else:
        found = unpack(numbers, width_of(max(2, quantizer.bits or 0)), as_matrix(layer).shape[1]).float()
        found += quantizer.lowest
        if not quantizer.symmetric:
            grid = Grid(scale, zero.float() + quantizer.lowest)
    become_quantized(layer, quantizer, None)
    # In fp32 whatever the scale's dtype is: each number is then found again by rounding.
    wide = Grid(scale.float(), grid.zero_point)
    as_matrix(layer).copy_(replace(quantizer, scale_dtype=torch.float32).dequantize(found, wide, torch.float32))
    layer.fix(grid)

"""A quantized student's own integers and scales in CTranslate2's variables, in place of those that it finds itself.

CTranslate2 holds int8 numbers q and a float32 factor f for each output, w = q / f. Its converter takes 127 / max|w| for
f, which is not the scale of training wherever -128 occurs. So it converts a model whose weights are the integers, and
once more one whose weights are the scales, and both are put together: layers that it joins or reorders stay right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn

from strategies.export.hf.written_config import config_of
from strategies.export.quantized_layers import Quantized, quantized_layers

JOINED = ("q_proj", "k_proj", "v_proj")  # layers that become one


def check_numbers(model: nn.Module) -> None:
    """Raise `ValueError` if CTranslate2 cannot hold the numbers of a quantized layer."""
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        quantizer, inputs = layer.quantizer, layer.weight.shape[1]
        if hasattr(layer, "outliers") or not isinstance(layer, nn.Linear | nn.Embedding):
            raise ValueError(f"{name} is a {type(layer).__name__}: quantized linear layers and embeddings are written")
        if layer.activations is not None:
            raise ValueError(f"{name} has quantized activations, and CTranslate2 rounds activations otherwise: leave "
                             "`quantization.activations` out")
        if quantizer.group_size not in (None, inputs) or not quantizer.symmetric or quantizer.kind == "fp8":
            what = ("fp8 numbers" if quantizer.kind == "fp8" else "zero points" if not quantizer.symmetric
                    else f"groups of {quantizer.group_size}")
            raise ValueError(f"{name} has {what}, and CTranslate2 holds symmetric integers with a scale for each "
                             "output: set `group_size: null`")
        owner, _, own = name.rpartition(".")
        if own in JOINED and (left := [part for part in JOINED if f"{owner}.{part}" not in layers]):
            raise ValueError(f"{name} is quantized and {left[0]} beside it is not, which CTranslate2 stores as one "
                             "matrix: quantize both or neither")


@torch.no_grad()
def plain_with(model: nn.Module, weight_of: Callable[[Quantized], torch.Tensor], rest: float | None = None
               ) -> nn.Module:
    """A plain copy of a model with other weights in quantized layers, and `rest`, if given, in all else."""
    plain = type(model)(config_of(model, torch.float32)).float()
    layers, own = dict(quantized_layers(model)), model.state_dict()
    for name, tensor in plain.state_dict().items():
        owner, _, part = name.rpartition(".")
        if owner in layers and part == "weight":
            tensor.copy_(weight_of(layers[owner]))
        else:
            tensor.copy_(own[name]) if rest is None else tensor.fill_(rest)
    return plain.eval()


def integers(layer: Quantized) -> torch.Tensor:
    """A layer's integers (outputs, inputs), in fp32."""
    return layer.numbers().float()


def scales(layer: Quantized) -> torch.Tensor:
    """A layer's scales (outputs, inputs), in fp32, the same along a row."""
    return layer.grid().scale.float().expand(layer.weight.shape)


def put_together(numbers: Any, factors: Any, dtype: str) -> Any:
    """The specification of a model whose quantized layers have int8 numbers and factors, and the rest a dtype.

    Args:
        numbers: the converter's specification of a model with integers for quantized weights.
        factors: that of the model with scales for these, and NaN in all else.
        dtype: one of CTranslate2's.
    """
    from ctranslate2.specs import model_spec

    numbers.validate()
    factors.validate()
    ours = set()
    for name, value in factors.variables().items():
        scale = value.to("float32").numpy() if value.dtype == "float32" and len(value.shape) == 2 else None
        if not name.endswith("/weight") or scale is None or numpy.isnan(scale).any():
            continue
        ours |= {name, f"{name}_scale"}
        spec = model_spec.index_spec(numbers, name.rpartition("/")[0])
        spec.weight = model_spec.NumpyVariable(spec.weight.to("float32").numpy().astype(numpy.int8))
        spec.weight_scale = model_spec.NumpyVariable(1 / scale[:, 0].astype(numpy.float32))
    numbers._alias_variables()
    numbers._quantize(dtype, variable_filter=lambda name: name not in ours)
    return numbers

"""Bytes of a student on disk, from shapes alone."""

from __future__ import annotations

import torch
from torch import nn

from strategies.export.layers import Quantized, quantized_layers
from strategies.export.transformers_folder import PARTS, folder_format, format_bits
from strategies.memory.packed import packed_bytes


def exported_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the tensors in a transformers folder: packed numbers, their scales, and the rest in `dtype`."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    parts = {id(parameter) for layer in layers.values() for name in PARTS
             if (parameter := getattr(layer, name, None)) is not None}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in parts)
    return rest * dtype.itemsize + sum(_layer(layer, dtype) for layer in layers.values())


def _layer(layer: Quantized, dtype: torch.dtype) -> int:
    return packed_bytes(layer.weight.shape[0], layer.weight[0].numel(), layer.quantizer,
                        bits=format_bits(layer.quantizer), packed=folder_format(layer) == "pack-quantized",
                        scale_bytes=dtype.itemsize,
                        static=layer.activations is not None and not layer.activations.dynamic)

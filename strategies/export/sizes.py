"""Bytes of a student on disk, from shapes alone."""

from __future__ import annotations

import torch
from torch import nn

from strategies.export.layers import Quantized, quantized_layers
from strategies.export.transformers_folder import PARTS, folder_format, format_bits


def exported_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the tensors in a transformers folder: packed numbers, their scales, and the rest in `dtype`."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    parts = {id(parameter) for layer in layers.values() for name in PARTS
             if (parameter := getattr(layer, name, None)) is not None}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in parts)
    return rest * dtype.itemsize + sum(_layer(layer, dtype) for layer in layers.values())


def _layer(layer: Quantized, dtype: torch.dtype) -> int:
    quantizer, outputs, inputs = layer.quantizer, layer.weight.shape[0], layer.weight[0].numel()
    groups = inputs // (quantizer.group_size or inputs)
    scales = 1 if quantizer.per_tensor else outputs * groups
    packed, bits = folder_format(layer) == "pack-quantized", format_bits(quantizer)
    words = outputs * -(-inputs * bits // 32)
    total = 4 * words + 16 if packed else outputs * inputs  # 16: the shape, two int64
    if not quantizer.symmetric:
        total += 4 * groups * -(-outputs * bits // 32) if packed and not quantizer.per_tensor else scales
    static = layer.activations is not None and not layer.activations.dynamic
    return total + dtype.itemsize * (scales + static)

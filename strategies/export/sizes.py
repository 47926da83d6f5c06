"""The size of an exported student in bytes, computed from shapes alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from strategies.export.hf.saved_names import saved_rows
from strategies.export.hf.transformers_folder import PARTS, folder_format, format_bits, holds_kernels
from strategies.export.quantized_layers import Quantized, is_turned, part_name, quantized_layers, weight_name
from strategies.memory.packed import packed_bytes

_FIXED = 64  # bytes of a safetensors header without tensors: length, metadata, and padding to a multiple of 8
_ENTRY = 130  # of a tensor besides its name: suffix, dtype, shape and two offsets, of at most 12 digits each


def exported_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the tensors in a transformers folder: packed integers, their scales, and everything else in `dtype`."""
    named = dict(quantized_layers(model))
    layers = {id(layer.weight): layer for layer in named.values()}
    rows = saved_rows(model, {weight_name(name, layer): layer.weight.shape for name, layer in named.items()})
    pieces = {id(layer.weight): max(1, len(rows[weight_name(name, layer)])) for name, layer in named.items()}
    parts = {id(parameter) for layer in layers.values() for name in PARTS
             if (parameter := getattr(layer, name, None)) is not None}
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in parts)
    return rest * dtype.itemsize + sum(
        _layer(layer, dtype, pieces[key], holds_kernels(named)) for key, layer in layers.items())


def header_bound(model: nn.Module, more_parts: int = 2, layers: Collection[str] = ()) -> int:
    """Upper bound on the bytes of the model's safetensors header: length, names, dtypes, shapes and offsets.

    Args:
        more_parts: number of tensors that a quantized layer is written as besides its integers; at least scale and
            shape.
        layers: names of layers that will be quantized later.
    """
    ready = dict(quantized_layers(model))
    named, total = {*ready, *layers}, _FIXED
    inner = {part_name(name, layer, part) for name, layer in ready.items() for part in PARTS if part != "weight"}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in inner:
            continue  # counted in `more_parts`
        pieces = 2 * tensor.shape[0] if tensor.ndim == 3 else 1  # experts are written separately
        parts = 1 + more_parts * (name.rpartition(".")[0] in named or tensor.ndim == 3)
        total += pieces * parts * (len(name) + _ENTRY)
    return total


def _layer(layer: Quantized, dtype: torch.dtype, pieces: int, kernels: bool) -> int:
    matrix = layer.matrix
    return packed_bytes(matrix.shape[0], matrix[0].numel(), layer.quantizer,
                        bits=format_bits(layer.quantizer), packed=folder_format(layer, kernels) == "pack-quantized",
                        scale_bytes=dtype.itemsize, turned=is_turned(layer), pieces=pieces,
                        static=layer.activations is not None and not layer.activations.dynamic)

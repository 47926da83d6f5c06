"""The student as a transformers folder: safetensors, integer weights bit-packed in the compressed-tensors format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import nn


class Quantizer(Protocol):
    """What is asked of the quantiser that trained a layer: its scales and its integers, to be written as they are."""

    bits: int
    group_size: int | None

    def scale(self, weight: torch.Tensor) -> torch.Tensor: ...

    def integers(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor: ...


def write_folder(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32) -> None:
    """Write a model so that `AutoModelForCausalLM.from_pretrained(folder)` loads it.

    Written beside and renamed: an interrupted export leaves no folder that looks finished.

    Args:
        folder: where; replaced if it exists.
        model: the trained model, its quantised layers still fake-quantising: each has its `quantizer`.
        tokenizer: saved with it.
        dtype: dtype of everything that is not quantised, and of the scales.
    """
    folder = Path(folder)
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "quantizer")}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = _dense(model, dtype, skip={f"{name}.weight" for name in quantized})
    for name, layer in quantized.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in _packed(layer).items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    _config(model, dtype, quantized).save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def _dense(model: nn.Module, dtype: torch.dtype, skip: set[str]) -> dict[str, torch.Tensor]:
    """Full-precision tensors by name; of tensors that are tied, the first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape)
        if name in skip or identity in seen:
            continue
        seen.add(identity)
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    return tensors


@torch.no_grad()
def _packed(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Integers (bit-packed into int32), scales and shape of one layer, as the compressed-tensors format names them."""
    scale = layer.quantizer.scale(layer.weight)
    integers = layer.quantizer.integers(layer.weight, scale)
    return {
        "weight_packed": pack_to_int32(integers.cpu(), layer.quantizer.bits),
        "weight_scale": scale.cpu().contiguous(),
        "weight_shape": torch.tensor(layer.weight.shape),
    }


def _config(model: nn.Module, dtype: torch.dtype, quantized: dict[str, nn.Module]) -> Any:
    config = type(model.config)(**model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if quantized:
        quantizer: Quantizer = next(iter(quantized.values())).quantizer
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        arguments = QuantizationArgs(num_bits=quantizer.bits, type="int", symmetric=True,
                                     strategy="group" if quantizer.group_size else "channel",
                                     group_size=quantizer.group_size)
        config.quantization_config = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)},
            ignore=sorted(linear - set(quantized)), format="pack-quantized", quantization_status="compressed",
        ).to_dict()
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in order; none where it is no folder here."""
    return sorted(folder.glob("*.safetensors"))

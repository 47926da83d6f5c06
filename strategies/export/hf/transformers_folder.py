"""Export to a transformers folder: safetensors, with quantized weights in the compressed-tensors format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import nn
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from strategies.common.generation_settings import save_generation_settings
from strategies.common.weight_file import save_weights
from strategies.export.hf.saved_names import as_saved, renamed, saved_rows
from strategies.export.hf.written_config import config_of, write_config
from strategies.export.quantized_layers import (
    Activations,
    Quantized,
    Quantizer,
    is_module,
    is_turned,
    part_name,
    quantized_layers,
    weight_name,
)
from strategies.export.saved_processor import saved_processor
from strategies.export.weight_reads import weight_reads

PARTS = ("weight", "first_ratio", "log_ratio", "scale", "zero_point", "input_scale")  # of a layer; see `_packed`
EXPERTS = r"re:.*\.experts\.\d+\..*"  # separate in files; transformers looks for a pattern with the word "experts"


def write_folder(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32,
                 beneath_adapter: bool = False) -> None:
    """Write a model so that `AutoModelForCausalLM.from_pretrained(folder)` loads it.

    The folder is written under another name and then renamed: an interrupted export leaves none that looks finished.

    Args:
        folder: the target; replaced if it exists.
        model: the trained model, whose quantized layers still fake-quantize: each has a `quantizer`.
        tokenizer: saved with the model.
        dtype: dtype of everything that is not quantized, and of the scales.
        beneath_adapter: have transformers dequantize the weights when it loads them, since peft needs to find them.
            All layers must then have the same numbers.

    Raises:
        ValueError: the format cannot represent one of the layers.
    """
    check_folder(model)
    folder = Path(folder)
    quantized = dict(quantized_layers(model))
    partial = folder.with_name(f".{folder.name}.partial")
    _remove(partial)
    partial.mkdir(parents=True)
    dense = _dense(model, dtype, skip={part_name(name, layer, part) for name, layer in quantized.items()
                                       for part in PARTS} | {weight_name(*item) for item in quantized.items()})
    # In a quantized file, transformers expects separate experts only if they are packed; others keep their layout.
    tensors = renamed(model, dense) if quantized else as_saved(model, dense)
    tensors |= _pieces(model, _once(quantized))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_weights(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = _config(model, dtype, quantized)
    if beneath_adapter and quantized:
        config.quantization_config["dequantize"] = True
    write_config(config, partial, model)
    save_generation_settings(model, partial)
    saved_processor(tokenizer, model).save_pretrained(partial)
    _remove(folder)
    os.rename(partial, folder)


def write_model_files(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write what describes a model, without its weights: configuration, generation settings, tokenizer.

    Args:
        folder: the target; left as it is if it exists.
        model: a transformers model, before or after it is quantized.
    """
    folder = Path(folder)
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    _remove(partial)
    partial.mkdir(parents=True)
    write_config(config_of(model, torch.float32), partial, model)
    save_generation_settings(model, partial)
    saved_processor(tokenizer, model).save_pretrained(partial)
    os.rename(partial, folder)


def _remove(folder: Path) -> None:
    """Remove a folder; of a symbolic link to one, remove only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _dense(model: nn.Module, dtype: torch.dtype, skip: set[str]) -> dict[str, torch.Tensor]:
    """Full-precision tensors by name; tied tensors once, under their first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape)
        if name in skip or identity in seen:
            continue
        seen.add(identity)
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    return tensors


def check_folder(model: nn.Module) -> None:
    """Raise `ValueError` if transformers could not reload one of the quantized layers from a folder.

    The limits were found with compressed-tensors 0.20 and transformers 5.24. Packed weights with zero points of groups
    or channels, embeddings and kernels of convolutions load only if weights are dequantized at load time, which ignores
    the quantization of activations and treats all layers as quantized alike.
    """
    layers = dict(quantized_layers(model))
    whole, read = next(iter(_dequantized(model, layers)), None), weight_reads(model).read
    rounded = next((name for name, layer in layers.items() if layer.activations is not None), None)
    other = whole and next((name for name, layer in layers.items() if is_module(layer) and (
        layer.quantizer != layers[whole].quantizer or is_turned(layer) != is_turned(layers[whole]))), None)
    if whole and (rounded or other):
        what = "a convolution" if is_kernel(layers[whole]) else "an embedding" if isinstance(
            layers[whole], nn.Embedding) else (
            "a matrix that is stored (inputs, outputs)" if is_turned(layers[whole]) else
            "asked for its weight by the model's own code" if whole in read else "a weight with zero points")
        problem = f"{rounded} quantizes its activations, which it then leaves out" if rounded else (
            f"{other} has other numbers, which it then takes for the same")
        raise ValueError(f"{whole} is {what}, which transformers loads dequantized only, and {problem}: "
                         + ("leave one of them out" if is_kernel(layers[whole]) else
                            "take symmetric weights and a whole embedding, or leave the other out"))
    for name, why in _cannot_hold(model, layers).items():
        raise ValueError(f"{name} {why}")
    experts = next((name for name, layer in layers.items() if not is_module(layer)), None)
    if experts and rounded:
        raise ValueError(f"{rounded} quantizes its activations, and {experts}, of experts, cannot: leave one of them "
                         "out")
    patched = {type(module).__name__ for module in model.modules()} & set(MODULES_TO_PATCH_FOR_QUANTIZATION)
    if layers and patched:
        raise ValueError(f"transformers makes other modules of {', '.join(patched)} where a file is quantized, which "
                         "do not read these weights: such a student cannot be quantized")


def must_be_alike(model: nn.Module) -> str | None:
    """A layer that transformers can load only if others are quantized like it; None if each may have its own scheme."""
    layers = dict(quantized_layers(model))
    whole = _dequantized(model, layers)
    experts = [name for name, layer in layers.items() if not is_module(layer)]
    return whole[0] if whole and len(layers) > 1 else experts[0] if len(experts) > 1 else None


def no_place(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """Layers that a folder cannot represent however they are quantized, each with the reason.

    Args:
        layers: layers of the model by name, quantized or still to be.
    """
    shapes = {name: layer.weight.shape for name, layer in layers.items() if not is_module(layer)}
    kept, found, used = saved_rows(model, shapes), {}, weight_reads(model).used
    beside = _linear_weights(layers) > sum(layer.weight.numel() for layer in layers.values() if is_kernel(layer))
    for name, layer in layers.items():
        if name in shapes and not (kept[name] and all(saved.endswith(".weight") for saved in kept[name])):
            found[name] = "is one tensor of all experts in files of this architecture, which nothing unpacks"
        elif is_kernel(layer) and beside:
            found[name] = (f"is a {type(layer).__name__} beside larger linear layers, which the format packs only "
                           "where no convolution is quantized")
        elif name not in shapes and not isinstance(layer, (nn.Linear, nn.Embedding)) and not (
                is_turned(layer) or is_kernel(layer)):
            found[name] = f"is a {type(layer).__name__}: the format has linear layers, embeddings and convolutions"
        elif name in used:
            found[name] = "is computed with past the layer by the model's own code, which sees its full precision"
    return found


def _cannot_hold(model: nn.Module, layers: dict[str, Quantized]) -> dict[str, str]:
    """Quantized layers that the format cannot represent with their present scheme, each with the reason."""
    found, experts = no_place(model, layers), {name: layer for name, layer in layers.items() if not is_module(layer)}
    first = next(iter(experts.values()), None)
    for name, layer in layers.items():
        quantizer = layer.quantizer
        if quantizer.group_size and holds_kernels(layers):
            found[name] = (f"has groups of {quantizer.group_size}, and beside quantized convolutions every output has "
                           "one scale: leave group_size out")
        elif is_turned(layer) and not quantizer.symmetric:
            found[name] = "is stored (inputs, outputs), which has no place for zero points: take symmetric weights"
        elif name not in experts:
            continue
        elif not quantizer.symmetric or quantizer.per_tensor or (quantizer.kind == "fp8" and quantizer.group_size):
            found[name] = ("belongs to experts, which transformers unpacks only with symmetric numbers and a scale for "
                           "each output or group, of fp8 for each output: take those, or leave experts out")
        elif first is not None and quantizer != first.quantizer:
            found[name] = "has other numbers than other experts, which transformers takes for the same"
    return found


def _dequantized(model: nn.Module, layers: Mapping[str, Quantized]) -> list[str]:
    """Quantized layers because of which transformers must dequantize all layers at load time."""
    if holds_kernels(layers):
        return sorted(layers, key=lambda name: not is_kernel(layers[name]))
    read = weight_reads(model).read
    return [name for name, layer in layers.items() if _loads_dequantized(layer)
            or (name in read and folder_format(layer) == "pack-quantized")]


def _loads_dequantized(layer: Quantized) -> bool:
    """Whether transformers can load a layer only by dequantizing it at load time."""
    quantizer = layer.quantizer
    return isinstance(layer, nn.Embedding) or is_turned(layer) or (
        not quantizer.symmetric and not quantizer.per_tensor and folder_format(layer) == "pack-quantized")


def _once(quantized: dict[str, Quantized]) -> dict[str, Quantized]:
    """The first of the layers that share a weight."""
    first: dict[int, str] = {}
    return {name: layer for name, layer in quantized.items() if first.setdefault(id(layer.weight), name) == name}


def _pieces(model: nn.Module, quantized: dict[str, Quantized]) -> dict[str, torch.Tensor]:
    """The tensors of quantized layers by their names in a file, with one tensor for each expert."""
    rows = saved_rows(model, {weight_name(name, layer): layer.weight.shape for name, layer in quantized.items()})
    tensors, kernels = {}, holds_kernels(quantized)
    for name, layer in quantized.items():
        own = weight_name(name, layer)
        whole = len(rows[own]) == 1 and is_module(layer) and next(iter(rows[own])).endswith(".weight")
        saved = rows[own] if whole or not is_module(layer) else {own: None}
        for file_name, part in _packed(layer, {key: None if is_module(layer) else at for key, at in saved.items()},
                                       kernels):
            tensors[file_name] = part
    return tensors


@torch.no_grad()
def _packed(layer: Quantized, saved: dict[str, torch.Tensor | None], kernels: bool
            ) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield integers, scales and zero points of a layer under the names of the compressed-tensors format.

    Args:
        saved: the layer's rows in each weight of the file, by name; None for all rows.
        kernels: see `folder_format`.
    """
    quantizer, grid, every = layer.quantizer, layer.grid(), layer.numbers().cpu()
    scales, zeros = grid.scale.cpu(), None if grid.zero_point is None else grid.zero_point.to(torch.int8).cpu()
    for name, rows in saved.items():
        numbers, scale = (part if rows is None else part[rows] for part in (every, scales))
        zero = zeros if zeros is None or rows is None else zeros[rows]
        if is_turned(layer):
            numbers, scale = numbers.T.contiguous(), scale.T
        elif is_kernel(layer):  # (outputs, 1, ...), as readers multiply them with kernels
            each = (-1, *[1] * (numbers.ndim - 1))
            scale, zero = scale.view(each), None if zero is None else zero.view(each)
        tensors = {"weight_scale": scale.flatten() if quantizer.per_tensor else scale.contiguous()}
        if folder_format(layer, kernels) == "pack-quantized":
            tensors |= {"weight_packed": pack_to_int32(numbers, format_bits(quantizer)),
                        "weight_shape": torch.tensor(numbers.shape)}
        else:
            tensors["weight"] = numbers.contiguous()
        if zero is not None:
            tensors["weight_zero_point"] = zero.flatten() if quantizer.per_tensor else pack_to_int32(
                zero, format_bits(quantizer), packed_dim=0) if "weight_packed" in tensors else zero
        if layer.activations is not None and not layer.activations.dynamic:
            tensors["input_scale"] = layer.input_scale.detach().cpu().to(scale.dtype).contiguous()
        for part, tensor in tensors.items():
            yield f"{name.removesuffix('weight')}{part}", tensor


def format_bits(quantizer: Quantizer) -> int:
    """Bits of an integer in the file: 1-bit values, which are one step above or below zero, take 2 bits there."""
    return max(2, quantizer.bits)


def is_kernel(layer: Any) -> bool:
    """Whether a layer is a convolution."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def holds_kernels(layers: Mapping[str, Any]) -> bool:
    """Whether some of the quantized layers of a model are convolutions."""
    return any(is_kernel(layer) for layer in layers.values())


def _linear_weights(layers: Mapping[str, Any]) -> int:
    """Weights that the format would pack if there were no convolutions."""
    return sum(layer.weight.numel() for layer in layers.values() if not is_kernel(layer))


def folder_format(layer: Quantized, kernels: bool = False) -> str:
    """The compressed-tensors name of the format that a layer is written in.

    Args:
        kernels: whether convolutions of the same model are quantized, too. transformers unpacks rows of matrices alone,
            and reads all layers in one format: every number then takes a byte.
    """
    if kernels:
        return "naive-quantized"
    if layer.quantizer.kind == "fp8":
        return "float-quantized" if layer.activations is not None else "naive-quantized"
    return "int-quantized" if layer.activations is not None and layer.quantizer.bits == 8 else "pack-quantized"


def _config(model: nn.Module, dtype: torch.dtype, quantized: dict[str, Quantized]) -> Any:
    config = config_of(model, dtype)
    kernels = holds_kernels(quantized)
    if quantized:
        groups: dict[tuple, list[str]] = {}
        for name, layer in quantized.items():
            groups.setdefault((layer.quantizer, layer.activations, is_module(layer)), []).append(name)
        schemes = {f"group_{number}": _scheme(quantized[names[0]], names, kernels) for number, names in enumerate(
            groups.values())}
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        of_experts = [scheme for scheme in schemes.values() if scheme.targets[0].startswith("re:")]
        if len(schemes) - len(of_experts) == 1 and not kernels and not any(
                isinstance(layer, nn.Embedding) for layer in quantized.values()):
            next(scheme for scheme in schemes.values() if scheme not in of_experts).targets = ["Linear"]  # short, and
            # what other tools expect
        formats = {folder_format(quantized[names[0]], kernels) for names in groups.values()}
        config.quantization_config = QuantizationConfig(
            config_groups=schemes, ignore=sorted(linear - set(quantized)), quantization_status="compressed",
            format=formats.pop() if len(formats) == 1 else "mixed-precision").to_dict()
        if _dequantized(model, quantized):
            config.quantization_config["dequantize"] = True
    return config


def _scheme(layer: Quantized, names: list[str], kernels: bool) -> QuantizationScheme:
    quantizer = layer.quantizer
    strategy = "tensor" if quantizer.per_tensor else "group" if quantizer.group_size else "channel"
    size: dict[str, Any] = {"strategy": strategy, "group_size": quantizer.group_size}
    if is_turned(layer) and strategy == "group":  # groups of inputs, which are the rows of the stored matrix
        size = {"strategy": "block", "block_structure": [quantizer.group_size, 1]}
    weights = QuantizationArgs(num_bits=format_bits(quantizer), type="float" if quantizer.kind == "fp8" else "int",
                               symmetric=quantizer.symmetric, **size)
    return QuantizationScheme(targets=sorted(names) if is_module(layer) else [EXPERTS], weights=weights,
                              format=folder_format(layer, kernels), input_activations=_inputs(layer.activations))


def _inputs(activations: Activations | None) -> QuantizationArgs | None:
    if activations is None:
        return None
    return QuantizationArgs(num_bits=activations.bits, type="float" if activations.kind == "fp8" else "int",
                            symmetric=True, strategy="token" if activations.dynamic else "tensor",
                            dynamic=activations.dynamic)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted; empty if it is not a local folder."""
    return sorted(folder.glob("*.safetensors"))

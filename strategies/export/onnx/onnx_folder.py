"""Export to ONNX for ONNX Runtime, with the packed integers and scales of training."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from strategies.common.generation_settings import save_generation_settings
from strategies.common.model_tasks import task_of
from strategies.export.hf.transformers_folder import format_bits
from strategies.export.hf.written_config import config_of, write_config
from strategies.export.logits_module import ClassLogits, Logits
from strategies.export.onnx.genai_config import write_genai_config
from strategies.export.onnx.onnx_cache import OPSET, CachedLogits, NoCache, Shape, cache_shapes, no_past
from strategies.export.onnx.onnx_layers import DOMAIN, same_tensors, stand_in, stand_of
from strategies.export.quantized_layers import ADDED, Quantized, quantized_layers
from strategies.export.saved_processor import saved_processor

FILE = "model.onnx"
ENCODED = ("input_ids", "attention_mask", "token_type_ids")  # inputs of a classifier of texts, as far as it has them
SIDE = 32  # height and width in pixels of an example image, for a model that says none
BITS = (2, 4, 8)  # bit widths that ONNX Runtime has products for
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Model types of transformers that torch is known to export to ONNX; others are tried first.
TRIED = ("bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama",
         "mistral", "olmo2", "opt", "phi", "qwen2", "qwen3", "stablelm", "starcoder2")
GROUPS = (16, 32, 64, 128, 256)  # group sizes that it supports


def write_onnx(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write a causal language model as a folder with `model.onnx`, for ONNX Runtime, onnxruntime-genai and optimum.

    The graph takes `input_ids` and `position_ids` (batch_size, sequence_length), `attention_mask` (batch_size,
    total_sequence_length), all int64, and for each layer i `past_key_values.i.key` and `.value` (batch_size, heads,
    past_sequence_length, width) in fp32. It returns `logits` (batch_size, sequence_length, vocabulary) and
    `present.i.key` and `.value` with the new tokens appended, in fp32. Of each axis with a name the size may vary; an
    empty past begins a text. Positions that restart at 0 separate packed documents, as in the model.

    A model without keys and values in every layer has a graph without a cache, which takes `input_ids` and
    `position_ids` alone.

    Quantized linear layers are `MatMulNBits` nodes of the domain com.microsoft, with the integers and scales of
    training. The folder is written under another name and then renamed: an interrupted export leaves none that looks
    finished. The model is not changed.

    Args:
        folder: the target; replaced if it exists.
        model: a transformers causal language model with fp32 weights, whose quantized layers still fake-quantize.
        tokenizer: saved with the model.
        dtype: storage dtype of everything that is not quantized; products are in fp32. Layers with half-precision
            scales are dequantized when the file is loaded, since only then are weights rounded as in training; with
            fp32 scales they stay packed in memory.

    Returns:
        Notes on what the folder cannot do.

    Raises:
        ValueError: ONNX Runtime does not support a layer, or a package is missing; see `check_onnx`.
    """
    check_onnx(model)
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = saved_processor(tokenizer, model)
    names = [name for name in ENCODED if name in getattr(tokenizer, "model_input_names", ENCODED[:2])]
    shapes, notes = _write_model(partial / FILE, model, dtype, names)
    write_config(config_of(model, dtype), partial, model)
    save_generation_settings(model, partial)
    tokenizer.save_pretrained(partial)
    if len(set(shapes)) == 1:
        write_genai_config(partial, model, FILE, shapes)
    elif shapes:
        notes.append("onnxruntime-genai cannot read it: its layers cache keys of different sizes")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return notes


def write_onnx_module(file: Path, module: nn.Module, example: torch.Tensor) -> None:
    """Write a module with one input and one output tensor as an ONNX file.

    Args:
        file: ends with .onnx; weights are stored next to it, in a file with .data appended to the name.
        module: its quantized layers still fake-quantize. 8-bit convolutions with a scale for each channel are stored as
            int8 followed by a `DequantizeLinear`.
        example: an input (batch, ...) of at least two rows; the first dimension of the graph's input is dynamic.

    Raises:
        ValueError: see `check_onnx`.
    """
    check_onnx(module)
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    interface = Interface({"input": ("batch_size", *(None,) * (example.ndim - 1))}, {"output": None})
    _write(partial / file.name, nn.Sequential(module), (example,), interface, torch.float32)
    file.unlink(missing_ok=True)
    for part in sorted(partial.iterdir(), reverse=True):  # the graph last: weights alone do not look finished
        os.replace(part, file.with_name(part.name))
    partial.rmdir()


def check_onnx(model: nn.Module) -> None:
    """Raise `ValueError` if ONNX Runtime does not support a quantized layer, or a package is missing.

    Support was determined with version 1.32 on a CPU. Only shapes are needed: weights are not read.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX files need {' and '.join(missing)}: pip install 'limbeck[onnx]'")
    for name, module in model.named_modules():
        if not isinstance(module, CONVOLUTIONS) and any(
                own.ndim == 3 and own.shape[0] > 1 for own in module.parameters(recurse=False)):
            raise ValueError(f"{name} holds a mixture of experts in one tensor, and ONNX has no product of each token "
                             "with its own")
    for name, layer in quantized_layers(model):
        _check(name, layer)
    for name, weight in _weights(model).items():
        if weight.dtype is not torch.float32:
            raise ValueError(f"{name} is {weight.dtype}: the graph multiplies in float32, so call model.float() first")


def try_onnx(model: nn.Module) -> None:
    """Raise `ValueError` if torch cannot export a model to ONNX; a model with random weights is enough."""
    with tempfile.TemporaryDirectory(prefix="limbeck-trial-") as folder:
        try:
            _write_model(Path(folder) / FILE, model.eval(), torch.float32)
        except Exception as error:  # the exporter raises many types, with long messages
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            if any(isinstance(cause, OSError) for cause in causes):
                raise  # a full disk says nothing about a model
            said = str(causes[-1]).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"torch makes no ONNX graph of {type(model).__name__}: {said[0][:300]}") from error


Axes = tuple[str | None, ...]  # a name for each axis whose size may vary


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a graph by name, in order, with their axes, and the opset of its operators."""

    inputs: dict[str, Axes]
    outputs: dict[str, Axes | None]
    opset: int | None = None


def _write_model(file: Path, model: nn.Module, dtype: torch.dtype, names: Sequence[str] = ENCODED[:2]
                 ) -> tuple[list[Shape], list[str]]:
    """Write a model's graph, with a cache if it can have one; returns the shapes of that, and notes.

    Args:
        names: the inputs of a classifier of texts.
    """
    model = same_tensors(model).eval()
    if task_of(model.config) != "causal_lm":
        _write_classifier(file, model, dtype, names)
        return [], []
    try:
        shapes = cache_shapes(model)
        _write(file, CachedLogits(model), _examples(model, shapes), _with_cache(len(shapes)), dtype)
        return shapes, []
    except (NoCache, torch.onnx.OnnxExporterError) as error:
        _write(file, Logits(model), _examples(model), Interface(
            {"input_ids": TOKENS, "position_ids": TOKENS}, {"logits": (*TOKENS, None)}), dtype)
        return [], [f"the graph of {type(model).__name__} has no cache, so that each token is computed with all before "
                    f"it: {(str(error).strip().splitlines() or [''])[0][:200]}"]


def _write_classifier(file: Path, model: nn.Module, dtype: torch.dtype, names: Sequence[str]) -> None:
    """Write the graph of a classifier: `logits` of `pixel_values`, or of tokens of any number."""
    device = next(model.parameters()).device
    if task_of(model.config) == "image_classification":
        size = getattr(model.config, "image_size", None) or SIDE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given = torch.zeros(3, model.config.num_channels, height, width, device=device)
        _write(file, ClassLogits(model, ["pixel_values"]), (given,), Interface(
            {"pixel_values": (TOKENS[0], None, None, None)}, {"logits": (TOKENS[0], None)}), dtype)
        return
    ids = torch.ones(3, 5, dtype=torch.long, device=device)
    axes = (*TOKENS, None) if task_of(model.config) == "token_classification" else (TOKENS[0], None)
    _write(file, ClassLogits(model, names), tuple(ids.clone() for _ in names), Interface(
        dict.fromkeys(names, TOKENS), {"logits": axes}), dtype)


TOKENS = ("batch_size", "sequence_length")
PAST, TOTAL = "past_sequence_length", "total_sequence_length"


def _with_cache(layers: int) -> Interface:
    """The interface of a language model with a cache, as onnxruntime-genai and optimum name it."""
    parts = [f"{number}.{part}" for number in range(layers) for part in ("key", "value")]
    return Interface(
        {"input_ids": TOKENS, "attention_mask": (TOKENS[0], TOTAL), "position_ids": TOKENS}
        | {f"past_key_values.{part}": (TOKENS[0], None, PAST, None) for part in parts},
        {"logits": (*TOKENS, None)} | {f"present.{part}": (TOKENS[0], None, TOTAL, None) for part in parts}, OPSET)


def _examples(model: nn.Module, shapes: Sequence[Shape] | None = None) -> tuple[Any, ...]:
    """Example inputs, with which a model is traced."""
    device = next(model.parameters()).device
    positions = torch.tensor([0, 1, 2, 0, 1], device=device).repeat(3, 1)
    ids = torch.zeros(3, 5, dtype=torch.long, device=device)
    if shapes is None:
        return ids, positions
    return ids, torch.ones(3, 12, dtype=torch.long, device=device), positions, no_past(shapes, 3, 7, device)


def _check(name: str, layer: Quantized) -> None:
    quantizer, activations = layer.quantizer, layer.activations
    if stand_of(layer) is None:
        raise ValueError(f"{name} is a {type(layer).__name__}: linear layers, embeddings and convolutions are written")
    if quantizer.kind == "fp8" or (activations is not None and activations.kind == "fp8"):
        raise ValueError(f"{name} has fp8 numbers, which ONNX Runtime does not multiply on a CPU: take 8 bits")
    if format_bits(quantizer) not in BITS:
        raise ValueError(f"{name} has {quantizer.bits} bits, and ONNX Runtime multiplies numbers of "
                         f"{', '.join(map(str, BITS))}: take {min(b for b in BITS if b > quantizer.bits)}")
    if quantizer.group_size not in (None, *GROUPS):
        raise ValueError(f"{name} has groups of {quantizer.group_size}, and ONNX Runtime multiplies groups of "
                         f"{', '.join(map(str, GROUPS))}: take one of them, or whole channels")


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, the exporter's warnings about optional packages and upcoming changes are suppressed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _write(file: Path, module: nn.Module, examples: tuple[Any, ...], interface: Interface, dtype: torch.dtype) -> None:
    """Trace the module, fill in its quantized layers, and save the graph.

    Args:
        examples: the module's arguments, tensors or lists of them.
        interface: names and axes of these, one by one, and of the outputs.
    """
    import onnx_ir as ir

    from strategies.export.onnx.onnx_graph import fill_in, name_axes, store_as

    axes = iter(interface.inputs.values())
    dynamic = tree_map(lambda _: {at: torch.export.Dim.DYNAMIC for at, name in enumerate(next(axes)) if name}, examples)
    with _quiet():
        program = torch.onnx.export(
            stand_in(module, dtype), examples, dynamo=True, verbose=False, dynamic_shapes=dynamic,
            input_names=list(interface.inputs), output_names=list(interface.outputs), custom_opsets={DOMAIN: 1},
            opset_version=interface.opset)
    graph = program.model
    fill_in(graph, dict(quantized_layers(module)))
    if dtype is not torch.float32:
        store_as(graph, dtype)
    name_axes(graph, {**interface.inputs, **interface.outputs})
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)  # stack traces take ten times the bytes of the graph
    graph.metadata_props["parameters"] = str(sum(parameter.numel() for parameter in _weights(module).values()))
    ir.save(graph, file, external_data=f"{file.name}.data")


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights by name, tied ones once, without the scales and zero points of quantized layers."""
    scales = {id(getattr(layer, part, None)) for _, layer in quantized_layers(module)
              for part in ADDED}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in scales}

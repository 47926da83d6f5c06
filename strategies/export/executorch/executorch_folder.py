"""Export to a folder with a .pte program for ExecuTorch, whose matrices XNNPACK multiplies."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strategies.export.executorch.executorch_layers import HalfRows, Rows, XnnpackLinear, multiplied, stored_as
from strategies.export.gguf.gguf_file import dequantized_reference
from strategies.export.hf.written_config import config_of, write_config
from strategies.export.logits_module import Logits
from strategies.export.quantized_layers import quantized_layers, weight_count
from strategies.export.readers import is_installed

FILE = "student.pte"
# Model types of transformers whose programs were compared with torch; others are tried first.
TRIED = ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt", "phi", "qwen2",
         "qwen3", "smollm3", "stablelm", "starcoder2")
MOST = 4096  # tokens: memory for so many is set aside when a program is loaded
PLANNED = 2**32  # most bytes of that memory for scores of attention and logits
KINDS = (nn.Linear, nn.Embedding, nn.Conv1d)


def write_executorch(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write a causal language model as a folder with `student.pte`, for ExecuTorch with XNNPACK on a CPU.

    The program's `forward` takes `input_ids` and `position_ids` (1, length), both int64, and returns fp32 logits (1,
    length, vocabulary), without a cache. Positions that restart at 0 separate packed documents, as in the model. Its
    method `get_max_seq_len` gives the largest length, `get_vocab_size` the vocabulary, and `parameters` the number of
    weights. The folder is written under another name and then renamed.

    Args:
        folder: the target; replaced if it exists.
        model: a transformers causal language model with fp32 weights, whose quantized layers still fake-quantize. It is
            not changed.
        tokenizer: saved with the model.
        dtype: values that are not quantized are rounded to it. Embeddings are stored in it, and matrices in fp32.

    Returns:
        Notes on what the program computes otherwise.

    Raises:
        ValueError: ExecuTorch cannot hold the model, or is not installed; see `check_executorch`.
    """
    check_executorch(model)
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / FILE).write_bytes(_program(model, dtype))
    write_config(config_of(model, dtype), partial, model)
    model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return _notes(model)


def check_executorch(model: nn.Module) -> None:
    """Raise `ValueError` if XNNPACK does not hold a layer's numbers, or ExecuTorch is not installed.

    Determined with version 1.5.1. Only shapes are needed: weights are not read.
    """
    if not is_installed("executorch"):
        raise ValueError("ExecuTorch is not installed: pip install 'limbeck[executorch]'")
    for name, module in model.named_modules():
        if any(own.ndim == 3 for own in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d):
            raise ValueError(f"{name} holds a mixture of experts in one tensor, which is not written for ExecuTorch")
    for name, layer in quantized_layers(model):
        if hasattr(layer, "outliers") or not isinstance(layer, KINDS):
            raise ValueError(f"{name} is a {type(layer).__name__}: linear layers, embeddings and 1-d convolutions are "
                             "written for ExecuTorch")
        if not multiplied(layer):
            continue
        if not isinstance(layer, nn.Linear) or layer.activations.kind == "fp8" or not layer.activations.dynamic:
            raise ValueError(f"{name} is a {type(layer).__name__} with quantized activations, and XNNPACK multiplies "
                             "those of linear layers in 8-bit integers, with a scale of each token: set `kind: int` "
                             "and `dynamic: true` in `quantization.activations`, or leave these out")
        stored_as(name, layer)


def try_executorch(model: nn.Module) -> None:
    """Raise `ValueError` if ExecuTorch makes no program of a model; one with random weights is enough."""
    try:
        _program(model.eval(), torch.float32)
    except Exception as error:  # torch and ExecuTorch raise many types, with long messages
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"ExecuTorch makes no program of {type(model).__name__}: {said[0][:300]}") from error


def longest(config: Any) -> int:
    """The most tokens that a program takes at once: the model's context, if memory for them is to be had."""
    heads, vocabulary = getattr(config, "num_attention_heads", None) or 1, config.vocab_size
    room = PLANNED // 4  # numbers: heads * length^2 + vocabulary * length
    length = int((math.sqrt(vocabulary**2 + 4 * heads * room) - vocabulary) / (2 * heads))
    return max(2, min(getattr(config, "max_position_embeddings", None) or MOST, MOST, length))


def _program(model: nn.Module, dtype: torch.dtype) -> bytes:
    tokens, positions = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1]])
    return lowered(Logits(_stand_in(model, dtype)), (tokens, positions), longest(model.config), {
        "get_max_seq_len": longest(model.config), "get_vocab_size": model.config.vocab_size,
        "parameters": weight_count(model)})


@torch.no_grad()
def lowered(module: nn.Module, examples: tuple[torch.Tensor, ...], most: int, numbers: dict[str, int]) -> bytes:
    """The program of a module, with everything that XNNPACK computes left to it.

    Args:
        examples: inputs whose second axis, the same in all, is dynamic.
        most: the largest size of that axis.
        numbers: what further methods, by name, return.
    """
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        length = torch.export.Dim("length", min=1, max=most)
        traced = torch.export.export(module, examples, dynamic_shapes=tuple({1: length} for _ in examples))
        edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()], constant_methods=numbers)
        return edge.to_executorch().buffer


def _stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain copy of a model, with numbers and scales where XNNPACK multiplies them or rows are looked up."""
    traced = dequantized_reference(model, dtype).cpu()
    for name, layer in quantized_layers(model):
        if multiplied(layer):
            bias = traced.get_submodule(name).bias  # it is rounded there
            traced.set_submodule(name, XnnpackLinear(name, layer, bias).cpu())
        elif isinstance(layer, nn.Embedding) and layer.quantizer.kind != "fp8":
            traced.set_submodule(name, Rows(layer).cpu())
    for name, module in list(traced.named_modules()):
        if type(module) is nn.Embedding and dtype is not torch.float32:
            traced.set_submodule(name, HalfRows(module, dtype))
    return traced.eval()


def _notes(model: nn.Module) -> list[str]:
    layers = [layer for _, layer in quantized_layers(model) if isinstance(layer, nn.Linear)]
    products = [multiplied(layer) for layer in layers]
    notes = [f"it takes texts of up to {longest(model.config)} tokens, one at a time, without a cache"]
    if any(products):
        notes.append("XNNPACK rounds what enters a quantized layer with a zero point of each token, and training "
                     "symmetrically: largest_difference is from a model that rounds as XNNPACK does")
    if not all(products):
        notes.append("layers that quantize weights alone have these dequantized, in float32: XNNPACK multiplies "
                     "integers with integers only")
    return notes


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, what ExecuTorch and torchao say of optional parts and coming changes is suppressed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

"""Export to a folder for CTranslate2, by its own converter."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from strategies.export.hf.ctranslate2_numbers import check_numbers, integers, plain_with, put_together, scales
from strategies.export.quantized_layers import quantized_layers, weight_count
from strategies.export.readers import is_installed

# What CTranslate2 4.8 reads and computes as transformers does; its converter fails with others, or asks for tokens.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE = ("default", "linear")  # it takes llama3 too, and leaves the scaling out
ROUNDED = ("unless it is loaded with compute_type=\"float32\", as for this receipt, CTranslate2 rounds activations, "
           "and weights that are not quantized, to 8 bits")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_ctranslate2(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write a causal language model as a folder with `model.bin`, and its tokenizer, for CTranslate2.

    Args:
        folder: the target; replaced if it exists.
        model: a transformers causal language model with fp32 weights, whose quantized layers still fake-quantize. It is
            not changed.
        tokenizer: of transformers.
        dtype: of weights that are not quantized; the integers of others are stored as they are.

    Returns:
        A note on what CTranslate2 does with integers unless told otherwise.

    Raises:
        ValueError: CTranslate2 does not support the model; see `check_ctranslate2`.
    """
    check_ctranslate2(model)
    from ctranslate2.converters import TransformersConverter

    folder = Path(folder)
    with tempfile.TemporaryDirectory(prefix="limbeck-convert-", dir=folder.parent) as room, _quiet():
        def spec(name: str, plain: nn.Module) -> Any:
            plain.save_pretrained(Path(room) / name)
            tokenizer.save_pretrained(Path(room) / name)
            return TransformersConverter(str(Path(room) / name))._load()

        if quantized := any(True for _ in quantized_layers(model)):
            found = put_together(spec("numbers", plain_with(model, integers)),
                                 spec("scales", plain_with(model, scales, math.nan)), DTYPES[dtype])
        else:
            found = spec("plain", model)
            found.validate()
            found.optimize(DTYPES[dtype])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found.save(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["parameters"] = weight_count(model)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    return [ROUNDED] if quantized else []


def check_ctranslate2(model: nn.Module) -> None:
    """Raise `ValueError` if CTranslate2 does not compute what a model does, or is not installed.

    Determined with version 4.8. Only shapes are needed: weights are not read.
    """
    if not is_installed("ctranslate2"):
        raise ValueError("CTranslate2 is not installed: pip install 'limbeck[ctranslate2]'")
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} models are not written for CTranslate2; {', '.join(ARCHITECTURES)} are")
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE:
        raise ValueError(f"CTranslate2 ignores how rope_type {rope} scales positions, and would predict otherwise; "
                         f"it has {' and '.join(ROPE)}")
    if config.hidden_act != "silu":
        raise ValueError(f"{config.model_type} models are written with `hidden_act: silu`, not {config.hidden_act}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type != "qwen3" and width * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"CTranslate2 has heads of hidden_size / num_attention_heads in {config.model_type} models, "
                         f"not of {width}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"CTranslate2 attends to everything in {config.model_type} models: turn sliding windows off")
    check_numbers(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, transformers shows no progress of what is saved and loaded for conversion."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

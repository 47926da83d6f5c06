"""Export to a folder for CTranslate2, by its own converter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from strategies.export.quantized_layers import quantized_layers

# What CTranslate2 4.8 reads and computes as transformers does; its converter fails with others, or asks for tokens.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE = ("default", "linear")  # it takes llama3 too, and leaves the scaling out
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_ctranslate2(folder: Path, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float32) -> None:
    """Write a causal language model as a folder with `model.bin`, and its tokenizer, for CTranslate2.

    Args:
        folder: the target; replaced if it exists.
        model: a transformers causal language model with fp32 weights, not quantized. It is not changed.
        tokenizer: of transformers.
        dtype: of the weights; CTranslate2 multiplies in float32 on a CPU unless told otherwise.

    Raises:
        ValueError: CTranslate2 does not support the model; see `check_ctranslate2`.
    """
    check_ctranslate2(model)
    from ctranslate2.converters import TransformersConverter

    folder = Path(folder)
    with tempfile.TemporaryDirectory(prefix="limbeck-convert-", dir=folder.parent) as plain, _quiet():
        model.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        shutil.rmtree(folder, ignore_errors=True)
        TransformersConverter(plain).convert(str(folder), quantization=DTYPES[dtype])
    config = json.loads((folder / "config.json").read_text())
    config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def check_ctranslate2(model: nn.Module) -> None:
    """Raise `ValueError` if CTranslate2 does not compute what a model does, or is not installed.

    Determined with version 4.8. Only shapes are needed: weights are not read.
    """
    if find_spec("ctranslate2") is None:
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
    for name, _ in quantized_layers(model):
        raise ValueError(f"{name} is quantized, and CTranslate2 rounds weights to 8 bits by itself: it cannot hold the "
                         "student's numbers")


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

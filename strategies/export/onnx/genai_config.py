"""The file by which onnxruntime-genai reads a folder with `model.onnx`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

NAME = "genai_config.json"
DECODER = "decoder"  # onnxruntime-genai's name for a causal language model without anything of its own
LENGTH = 2048  # tokens, if a model's configuration has no number


def write_genai_config(folder: Path, model: nn.Module, file: str, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Write `genai_config.json`, with greedy decoding unless the caller of onnxruntime-genai asks for something else.

    Args:
        folder: with the graph.
        model: the transformers model in it.
        file: the graph's name.
        shapes: heads and widths of each layer's keys and values; one for all, since the file has room for one.
    """
    config, generation = model.config.get_text_config(decoder=True), model.generation_config
    length = getattr(config, "max_position_embeddings", None) or LENGTH
    heads, width, _ = shapes[0]
    ends = _of(generation, config, "eos_token_id")
    decoder = {
        "filename": file, "head_size": width, "hidden_size": config.hidden_size, "num_hidden_layers": len(shapes),
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": heads,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {**{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                   "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"}}
    tokens = {"bos_token_id": _of(generation, config, "bos_token_id"), "eos_token_id": ends,
              "pad_token_id": _of(generation, config, "pad_token_id")}
    if tokens["pad_token_id"] is None:  # it needs one, and padding is hidden whatever it is
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    found = {"model": {"type": DECODER, "vocab_size": config.vocab_size, "context_length": length, "decoder": decoder,
                       **{name: token for name, token in tokens.items() if token is not None}},
             # The graph returns a longer cache than it takes, so that the two cannot share their memory.
             "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False}}
    (folder / NAME).write_text(json.dumps(found, indent=2) + "\n")


def _of(generation: Any, config: Any, name: str) -> Any:
    value = getattr(generation, name, None)
    return getattr(config, name, None) if value is None else value

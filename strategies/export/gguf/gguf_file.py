"""Export to a GGUF file for llama.cpp and tools built on it, with the integers and scales of training unchanged."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from strategies.export.gguf.gguf_added_tokens import check_added_tokens
from strategies.export.gguf.gguf_blocks import GgufBlock, block_for, blocks_of
from strategies.export.gguf.gguf_vocabulary import Vocabulary, vocabulary_of
from strategies.export.quantized_layers import Quantized, quantized_layers

GRID = ("first_ratio", "log_ratio", "scale", "zero_point")  # what quantization adds to a layer
SUFFIXES = (".weight", ".bias")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # llama.cpp's by ours
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
QUANTIZATION_VERSION = 2  # version of ggml's block formats


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's name.
        shape: rows first.
        type: name of the GGUF type.
        bytes: size of its data.
        source: a quantized layer and its block type, or a tensor.
        rows: (outputs,) order in which rows are written; None for unchanged.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    source: tuple[Quantized, GgufBlock] | torch.Tensor
    rows: torch.Tensor | None


def write_gguf(file: Path | str, model: nn.Module, tokenizer: Any, dtype: torch.dtype = torch.float16) -> None:
    """Write a model so that llama.cpp loads it, converting one tensor at a time to save memory.

    Quantized layers are written in the smallest type that gives the same weights, scale * (q - zero_point) in fp32; see
    `gguf_blocks.BLOCKS`. Embeddings that are tied to the head are written once. The file is written under another name
    and then renamed.

    Args:
        file: the target; replaced if it exists.
        model: a transformers causal language model, whose quantized layers still fake-quantize.
        tokenizer: a byte-level BPE tokenizer of transformers.
        dtype: of matrices that are not quantized. Vectors are rounded to it but stored in float32, as llama.cpp expects
            them.

    Raises:
        ValueError: llama.cpp does not support the model, a layer, or the tokenizer.
    """
    check_gguf(model)
    if dtype not in PLAIN:
        raise ValueError(f"GGUF is written in {', '.join(map(str, PLAIN))}, not {dtype}")
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    gguf, file = _library(), Path(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[model.config.model_type])
    entries = list(_entries(model, dtype))
    _describe(writer, model, vocabulary, entries)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, numpy.dtype(numpy.float32), entry.bytes,
                               raw_dtype=gguf.GGMLQuantizationType[entry.type])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_data(entry, dtype))
        writer.close()
        os.replace(partial, file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def check_gguf(model: nn.Module) -> None:
    """Raise `ValueError` if GGUF or llama.cpp does not support a model; only shapes are needed, not weights."""
    _library()
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} models are not written for llama.cpp; {', '.join(ARCHITECTURES)} are")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"llama.cpp has {config.model_type} models with `hidden_act: silu`, not {config.hidden_act}")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (config.model_type == "mistral" and config.sliding_window is not None):
        raise ValueError(f"llama.cpp attends to everything in {config.model_type} models: set `sliding_window: null`")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ValueError("llama.cpp has no biases in the attention of qwen3 models: set `attention_bias: false`")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise ValueError(f"positions of rope_type {rope} are not written to GGUF; default, linear and llama3 are")
    names, layers = _names(config), dict(quantized_layers(model))
    for name, layer in layers.items():
        block_for(layer, name)
    for name in model.state_dict():
        if not _within(name, layers) and names.get_name(name, SUFFIXES) is None:
            raise ValueError(f"{name} is no tensor that llama.cpp has in {config.model_type} models")


def read_by_gguf(tokenizer: Any, size: int, texts: list[str]) -> list[str]:
    """Notes on how llama.cpp would tokenize text with an exported tokenizer; see `check_added_tokens`.

    Args:
        tokenizer: a transformers tokenizer.
        size: number of the model's logits.
        texts: texts that must be tokenized as transformers does.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or would tokenize the texts differently.
    """
    vocabulary_of(tokenizer, size)
    return check_added_tokens(tokenizer, texts)


@torch.no_grad()
def dequantized_reference(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A plain float32 copy of a model with the weights of its GGUF file, which a reader of the file has to reproduce.

    Quantized weights are scale * (q - zero_point) in fp32; some of these would be rounded in a 16-bit dtype.
    """
    layers, state = dict(quantized_layers(model)), {}
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if owner in layers and part == "weight":
            state[name] = _weights(layers[owner])
        elif not _within(name, layers):
            state[name] = tensor.to(dtype).float()
    plain = type(model)(copy.deepcopy(model.config)).float()
    plain.load_state_dict(state)
    for name, tensor in plain.state_dict().items():
        if not torch.equal(tensor, state[name].to(tensor)):  # tied by the configuration, yet trained separately
            raise ValueError(f"{name} is lost where a model is made from this configuration, and was trained")
    return plain.to(next(model.parameters()).device).eval()


def _weights(layer: Quantized) -> torch.Tensor:
    """scale * (q - zero_point), (outputs, inputs) in fp32."""
    grid, numbers = layer.grid(), layer.numbers().float()
    groups = numbers.reshape(*grid.scale.shape, -1)
    if grid.zero_point is not None:
        groups = groups - grid.zero_point.unsqueeze(-1)
    return (groups * grid.scale.float().unsqueeze(-1)).reshape(numbers.shape)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF needs a package that is not installed: pip install 'limbeck[gguf]'") from error
    return gguf


# ---- tensors

def _entries(model: nn.Module, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield every tensor once; of tied ones, the first."""
    config, names = model.config, _names(model.config)
    layers, seen = dict(quantized_layers(model)), set()
    yield from _frequencies(model)
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        identity = (tensor.data_ptr(), tensor.shape)
        if _within(name, layers) or identity in seen:
            continue
        seen.add(identity)
        written, shape, rows = names.get_name(name, SUFFIXES), tuple(tensor.shape), _rotary_rows(name, config)
        if owner in layers and part == "weight":
            block = block_for(layers[owner], owner)
            size = tensor.numel() // block.weights * block.bytes
            yield Entry(written, shape, block.name, size, (layers[owner], block), rows)
        else:
            plain = torch.float32 if tensor.ndim == 1 else dtype
            yield Entry(written, shape, PLAIN[plain], tensor.numel() * plain.itemsize, tensor, rows)


def _names(config: Any) -> Any:
    """The map from transformers' tensor names to llama.cpp's."""
    gguf = _library()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _within(name: str, layers: dict[str, Quantized]) -> bool:
    """Whether a tensor belongs to a quantized layer's scales, which are written inside its blocks."""
    owner, _, part = name.rpartition(".")
    return owner in layers and part in GRID


def _rotary_rows(name: str, config: Any) -> torch.Tensor | None:
    """The order of query or key rows if llama.cpp rotates adjacent pairs, where transformers pairs halves of a head."""
    if ARCHITECTURES[config.model_type] != "llama" or ".q_proj." not in name and ".k_proj." not in name:
        return None
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return torch.arange(heads * _head_width(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _frequencies(model: nn.Module) -> Iterator[Entry]:
    """Divisors (head_dim / 2,) that llama.cpp applies to rotary frequencies, for `rope_type` `llama3`."""
    parameters = model.config.rope_parameters
    if parameters["rope_type"] == "llama3":
        scaled = model.model.rotary_emb.original_inv_freq.double().cpu()
        own = parameters["rope_theta"] ** (-torch.arange(0, len(scaled), dtype=torch.float64) / len(scaled))
        yield Entry("rope_freqs.weight", tuple(scaled.shape), "F32", 4 * len(scaled), (own / scaled).float(), None)


@torch.no_grad()
def _data(entry: Entry, dtype: torch.dtype) -> numpy.ndarray:
    """The data of a tensor as uint8."""
    if isinstance(entry.source, tuple):
        return blocks_of(*entry.source, entry.name, entry.rows)
    tensor = entry.source.detach() if entry.rows is None else entry.source.detach()[entry.rows]
    if entry.name != "rope_freqs.weight":
        tensor = tensor.to(dtype)
    if entry.type == "F32":
        tensor = tensor.float()
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


# ---- metadata

def _describe(writer: Any, model: nn.Module, vocabulary: Vocabulary, entries: list[Entry]) -> None:
    """Write the file's metadata."""
    gguf, config, rope = _library(), model.config, model.config.rope_parameters
    width = _head_width(config)
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    matrices = [entry for entry in entries if len(entry.shape) == 2]
    most = max({entry.type for entry in matrices}, key=lambda kind: sum(
        entry.bytes for entry in matrices if entry.type == kind))
    writer.add_file_type(_file_type(gguf, most))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    _describe_tokenizer(writer, vocabulary)


def _file_type(gguf: Any, most: str) -> int:
    """llama.cpp's enum value for files whose tensors are mostly of one type."""
    names = {kind.name: kind for kind in gguf.LlamaFileType}
    return names["ALL_F32"] if most == "F32" else next(
        kind for name, kind in names.items() if name in (f"MOSTLY_{most}", f"MOSTLY_{most}_S"))


def _describe_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pretokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)

"""Tiny configurations of every causal architecture, found from its configuration class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

LAYERS, WIDTH, HEADS, SHARED, HEAD = 4, 64, 4, 2, 16
POSITIONS, LENGTH = 128, 40
# What a number with such a name becomes, where it is larger. The first pattern that is found in the name decides.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|^n_vocab|vocabulary", 0),  # the tokenizer's
    (r"max_position|^n_positions|^n_ctx|max_seq|seq_length|context_length|max_source|max_target|^max_length",
     POSITIONS),
    (r"sliding_window|attention_window|window_size|local_block|attention_chunk|chunk_length|^local_window", 8),
    (r"(mamba|ssm|lightning|linear|conv).*(n_heads|num_heads|num_key_heads|num_value_heads|num_.*heads)", 4),
    (r"index_n_heads|index_num_heads|indexer_n_heads", 16),  # else scores are tied at zero
    (r"key_value_heads|kv_heads|^n_head_kv|num_query_groups|num_attention_groups", SHARED),
    (r"num_.*heads|^n_heads?$|n_layer_heads|attention_heads|index_n_heads|^num_heads", HEADS),
    (r"num_.*layers$|^n_layers?$|^num_layers|^n_block|num_blocks$|num_hidden_blocks", LAYERS),
    (r"first_k_dense|num_dense_layers|n_dense_layers|num_kv_shared_layers|kv_shared|moe_layer_start", 1),
    (r"n_group$|num_groups?$|n_groups|topk_group|num_expert_group", 1), (r"index_topk|index_top_k", 8),
    (r"experts_per_tok|num_experts_per|top_k|topk|_k$|num_selected", 2),
    (r"num_shared_experts|n_shared_experts|zero_expert", 1),
    (r"num_.*experts|n_routed_experts|moe_num_experts|n_experts|num_experts", 4),
    (r"head_dim|head_size|d_kv|kv_channels|qk_nope|qk_rope|v_head|d_head|headdim|attention_head|head_width", HEAD),
    (r"state_size|d_state|ssm_state", 8),
    (r"q_lora_rank", 32), (r"rank", 16),
    (r"chunk_size", 8),
    (r"intermediate|ffn|inner|mlp|d_ff|feed_forward", 2 * WIDTH),
    (r"hidden|d_model|n_embd|^dim$|embed|width|_dim$|size_per_layer|channels|units|d_in|d_out", WIDTH),
)
KEEP = re.compile(r"token|_id$|_ids|kernel|d_conv|conv_l|expand|patch|image|interval|pattern|period|bits|num_labels|"
                  r"factor|group_size|pretraining_tp|num_beams|stride|step|freq|every|ratio|buckets|nextn|mtp|L_cache")
# Mended with these, one after another, where a model cannot be built or run.
MENDS: tuple[dict[str, Any], ...] = (
    {}, {"num_key_value_heads": HEADS}, {"mamba_n_heads": 2 * HEADS, "num_heads": 2 * HEADS}, {"rotary_dim": 8},
    {"num_key_value_heads": HEADS, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16})
# What no rule finds.
OF_TYPE: dict[str, dict[str, Any]] = {
    "beam": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dory": {"num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2,
             "+layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2},
    "lfm2_moe": {"+layer_types": ["conv", "full_attention", "full_attention", "conv"], "num_dense_layers": 1},
    "xmod": {"+default_language": "en_XX"},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32],
                 "+attn_layers": ["local", "lsh", "lsh", "local"], "lsh_attn_chunk_length": 8},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD, "num_key_value_heads": HEADS},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD, "num_key_value_heads": HEADS,
               "n_mamba_heads": 8, "mamba_headdim": 16, "hybrid_layer_ids": [1, 3],
               "+layers_block_type": ["linear_attention", "hybrid"] * 2, "num_query_groups": HEADS},
    "falcon_h1": {"mamba_d_ssm": WIDTH, "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma3n": {"num_kv_shared_layers": 2},
    "dots3_note": {"num_key_value_heads": HEADS, "head_dim": 32},
    "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": 32},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), {
        "+indexer_n_heads": 16, "+indexer_kv_heads": 1, "+indexer_head_dim": HEAD, "+indexer_budget": 16,
        "+indexer_compress_ratio": 4}),
}


NOT_IN_TEXTS = 5  # the token of one punctuation mark: where images are put into a text, none is to be


def types() -> list[str]:
    """Model types that have a causal language model."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny(model_type: str, vocabulary: int) -> PretrainedConfig:
    """A tiny configuration of a type, whose model can be built and run.

    Raises:
        RuntimeError: none was found; the message ends with what the model said.
    """
    said, tries = "", _tries(model_type, vocabulary)
    while True:
        try:
            values = next(tries, None)
        except Exception as error:  # of every kind: other people's constructors
            said, values = said or repr(error)[:200], None
        if values is None:
            raise RuntimeError(f"no tiny dimensions were found: {said}")
        try:
            config = AutoConfig.for_model(model_type, **values)
            runs(config)
            return config
        except Exception as error:  # of every kind: other people's constructors
            said = said or f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"


def runs(config: PretrainedConfig) -> nn.Module:
    """A model of a configuration, after one forward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(10, 10 + LENGTH)[None], use_cache=False).logits
    if logits.shape[:2] != (1, LENGTH):
        raise ValueError(f"logits of shape {tuple(logits.shape)}")
    return model


def _tries(model_type: str, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Values to try, those of most architectures first."""
    default = AutoConfig.for_model(model_type).to_dict()
    for fill in (False, True):
        values = _shrunk(default, vocabulary, fill)
        values.pop("model_type", None)
        for changes in MENDS:
            yield _changed(values, {"is_decoder": True, **changes, **OF_TYPE.get(model_type, {})})


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With other values for those keys that are there, at any depth; one with `+` is put wherever `vocab_size` is."""
    found = {name: _changed(value, changes) if name.endswith("config") and isinstance(value, dict) and
             name not in changes else changes.get(name, value) for name, value in values.items()}
    more = {name[1:]: value for name, value in changes.items() if name.startswith("+")}
    return found | more if "vocab_size" in found else found


def _shrunk(values: dict[str, Any], vocabulary: int, fill: bool) -> dict[str, Any]:
    """Values of a configuration made small; what has none gets a size by its name, where it is to be filled."""
    depth = next((values[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
                  if isinstance(values.get(name), int)), 0)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if name.endswith("config"):
                found[name] = _shrunk(value, vocabulary, fill)
            elif "rope" in name:
                found[name] = value
        elif isinstance(value, float) and re.search("drop|jitter", name):
            found[name] = 0.0  # what is random is not compared
        elif isinstance(value, list):
            value = [_smaller(name, one, vocabulary) if type(one) is int else one for one in value]
            found[name] = _layers(value) if depth and len(value) == depth else value
        elif name.endswith("_token_id") and isinstance(value, int):
            ours = name in ("bos_token_id", "eos_token_id", "pad_token_id")
            found[name] = value if value < vocabulary and ours else 0 if ours else NOT_IN_TEXTS
        elif type(value) is int:
            found[name] = _smaller(name, value, vocabulary)
        elif value is None and fill and (size := _smaller(name, 10**9, vocabulary)) < 10**9:
            found[name] = size
        elif name not in ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _layers(values: list[Any]) -> list[Any]:
    """Of a list with an entry for each layer, one for each of four: `[A, B, B, A]` where there are two kinds."""
    kinds = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    second = kinds[1 % len(kinds)]
    return [kinds[0], second, kinds[2 % len(kinds)] if len(kinds) > 2 else second, kinds[0]]


def _smaller(name: str, value: int, vocabulary: int) -> int:
    if KEEP.search(name):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return vocabulary if not size else min(value, size) if value > 0 else value
    return value

"""Tiny models of many architectures, with weights large enough that a wrong cut shows, and rows to run them on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 101
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
                          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
ENCODER: dict[str, Any] = {**COMMON, "num_attention_heads": 4, "num_labels": 3}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}
IMAGES = {"num_labels": 3, "image_size": 32}
CUTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": 0.5}, "kv_heads": {"kv_heads": 0.5}, "heads and width": {"heads": 0.5, "width": 0.5},
    "mlp": {"mlp": 0.6}, "width": {"width": 0.75}, "rotation": {"width": 0.75, "width_by": "rotation"},
    "layers": {"layers": 0.5}, "experts": {"experts": 0.5}, "channels": {"channels": 0.5}}

# By name: classes of model and configuration, and the configuration's values.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", {**COMMON, "num_attention_heads": 4}),
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForSequenceClassification", ENCODER),
    "modernbert": ("ModernBertForSequenceClassification", {
        **ENCODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    "vit": ("ViTForImageClassification", {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8,
        **IMAGES}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {
        **GROUPED, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "mlp_only_layers": [1]}),
    "gpt_oss": ("GptOssForCausalLM", {**GROUPED, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {
        **GROUPED, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32,
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16,
        "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
        "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "resnet": ("ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck", "num_labels": 3}),
    "resnet, basic": ("ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic", "num_labels": 3}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.5, **IMAGES})}


def make(family: str, seed: int = 0, **values: Any) -> nn.Module:
    """A model of a family with random weights; `values` replace some of its configuration's."""
    name, own = FAMILIES[family]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**own, **values}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            weight.normal_(std=1.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.5)
            if weight.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                weight.abs_().add_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def rows(model: nn.Module, count: int = 4, length: int = 12, padded: int = 4) -> dict[str, torch.Tensor]:
    """Inputs of a model: images, or texts of which the second ends with `padded` tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, -padded:], mask[1, -padded:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def kinds_of(family: str) -> dict[str, dict[str, Any]]:
    """The cuts that make sense for a family: of convolutions channels, of experts where it has some."""
    values = FAMILIES[family][1]
    if "num_attention_heads" not in values and "n_head" not in values:
        return {"channels": CUTS["channels"]}
    experts = any("experts" in name for name in values)
    return {name: cut for name, cut in CUTS.items() if name != "channels" and (experts or name != "experts")}



"""Small models for tests of early exits, whose answers differ from input to input."""

import importlib.util
import sys

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 64, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
CLASSES = {"num_labels": 5}
LANGUAGE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, sliding_window=8, final_logit_softcapping=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
}
CLASSIFIERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, **CLASSES)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=4, n_heads=4, **CLASSES)),
    "modernbert": lambda: ModernBertForSequenceClassification(ModernBertConfig(
        **TEXT, **CLASSES, classifier_pooling="mean", attn_implementation="sdpa")),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER, **CLASSES)),
    "tokens": lambda: BertForTokenClassification(BertConfig(**TEXT, **CLASSES)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **CLASSES, image_size=8, patch_size=4, num_channels=1)),
}


def made(make, seed=0):
    """A model in evaluation mode with large weights, and the name of its class in its configuration."""
    torch.manual_seed(seed)
    model = make().eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def inputs_of(model, rows=6):
    """Rows for a classifier; of texts they have lengths of their own."""
    draw = torch.Generator().manual_seed(1)
    if hasattr(model.config, "patch_size"):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=draw)}
    mask = (torch.arange(9) < torch.arange(4, 4 + rows)[:, None]).long()
    return {"input_ids": torch.randint(1, 64, (rows, 9), generator=draw) * mask, "attention_mask": mask}


def code_of(folder):
    """The exported code of a folder, as its user imports it."""
    spec = importlib.util.spec_from_file_location("early_exit", folder / "early_exit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["early_exit"] = module
    spec.loader.exec_module(module)
    return module

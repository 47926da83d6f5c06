"""Names and pieces of tensors in a folder: those that transformers' own `save_pretrained` writes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.hf.saved_names import saved_rows
from strategies.export.hf.transformers_folder import write_folder
from tests.strategies.export.hf.test_transformers_folder import Tokenizer

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 2,
         "pad_token_id": None}
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
                    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_attention_heads": None},
    "lfm2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
                    "intermediate_size_mlp": 48, "head_dim": 8},
}


def mixture(kind: str, **changes):
    """A tiny mixture of experts."""
    torch.manual_seed(3)
    values = {name: value for name, value in {**SMALL, **MIXTURES[kind], **changes}.items()
              if name != "num_attention_heads" or value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():  # some weights begin as zeros, in which nothing could be seen to be mixed up
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_written_as_its_own_save_pretrained_writes_it(kind, tmp_path):
    model = mixture(kind)
    write_folder(tmp_path / "ours", model, Tokenizer())
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_a_model_that_was_loaded_is_written_like_one_that_was_made(tmp_path):
    model, ids = mixture("mixtral"), torch.arange(24).view(2, 12)
    write_folder(tmp_path / "made", model, Tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    write_folder(tmp_path / "again", loaded, Tokenizer())
    made, again = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "again"))
    assert made.keys() == again.keys() and "model.layers.1.block_sparse_moe.experts.3.w2.weight" in made
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_rows_of_experts_are_found_in_the_file_wherever_they_are(tmp_path):
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    shapes = {name: weight.shape for name, weight in model.named_parameters() if weight.ndim >= 2}
    found = saved_rows(model, shapes)
    assert sum(map(len, found.values())) == sum(1 for tensor in theirs.values() if tensor.ndim == 2)
    for name, saved in found.items():
        weight = model.get_parameter(name).detach().flatten(0, -2)
        assert all(torch.equal(theirs[other], weight[rows]) for other, rows in saved.items())
    granite = mixture("granitemoe")
    stacked = {name: weight.shape for name, weight in granite.named_parameters() if weight.ndim == 3}
    assert len(stacked) == 4 and not any(saved_rows(granite, stacked).values())

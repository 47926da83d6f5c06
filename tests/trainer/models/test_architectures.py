"""`architecture`: keys as published files have them act, misspelled ones are refused."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from trainer.errors import UserError
from trainer.experiment.model_nodes import Model
from trainer.models.architecture_keys import known_keys
from trainer.models.configs import _config

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 300}
PUBLISHED = {"architectures": ["X"], "_name_or_path": "a/b", "transformers_version": "4.44.0", "use_cache": True,
             "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": [128001, 128008], "pretraining_tp": 1,
             "temperature": 0.7}


def made(**architecture):
    return _config(Model(architecture=architecture), "student", None, offline=True)


def parameters(config):
    with torch.device("meta"):
        return sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())


def test_a_rotary_base_of_a_published_file_is_the_one_that_the_model_turns_by(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
    values = {"model_type": "llama", **SMALL, "rope_theta": 500000.0, "rope_scaling": scaling, **PUBLISHED}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = made(**values), AutoConfig.from_pretrained(tmp_path)
    assert ours.rope_parameters == theirs.rope_parameters == {**scaling, "rope_theta": 500000.0}
    assert len(scaling) == 5  # what the experiment holds is as it was
    ours, theirs = (AutoModelForCausalLM.from_config(one).model.rotary_emb.inv_freq for one in (ours, theirs))
    assert torch.equal(ours, theirs)


def test_a_width_of_heads_that_only_the_model_reads_counts():
    narrow = made(model_type="qwen3_moe", **SMALL, num_experts=4, moe_intermediate_size=32)
    wide = made(model_type="qwen3_moe", **SMALL, num_experts=4, moe_intermediate_size=32, head_dim=32)
    # queries and outputs of 4 heads, keys and values of 2, each 16 wider; two norms of a head's width
    assert parameters(wide) - parameters(narrow) == 2 * (64 * 16 * (4 + 4 + 2 + 2) + 2 * 16)


@pytest.mark.parametrize("model_type, wrong, near", [
    ("llama", "hiden_size", "hidden_size"), ("llama", "rope_teta", "rope_theta"), ("gpt2", "n_layr", "n_layer"),
    ("qwen3", "head_dims", "head_dim"), ("gpt2", "rope_theta", None), ("gemma3", "sliding_windw", None)])
def test_a_key_that_no_model_reads_is_refused(model_type, wrong, near):
    with pytest.raises(UserError) as refused:
        made(model_type=model_type, **{wrong: 10})
    assert refused.value.key == f"student.architecture.{wrong}"
    assert (f"`{near}`" if near else "does not read it") in refused.value.way_out


def test_a_misspelled_key_of_a_section_or_of_a_whole_published_file_is_refused():
    for values in ({"text_config": {"hiden_size": 8}}, {**PUBLISHED, "text_config": {"hiden_size": 8}}):
        with pytest.raises(UserError, match="no such dimension") as refused:
            made(model_type="gemma3", **values)
        assert refused.value.key == "student.architecture.text_config.hiden_size"


def test_two_rotary_bases_are_refused():
    with pytest.raises(UserError, match="rope_parameters"):
        made(model_type="llama", **SMALL, rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def test_keys_that_configurations_write_are_known():
    for model_type in ("llama", "qwen2", "qwen3_moe", "gemma2", "phi3", "gpt2", "gpt_neox", "mistral", "deepseek_v3"):
        config_class = CONFIG_MAPPING[model_type]
        assert {*config_class().to_diff_dict()} - {"model_type", "transformers_version"} <= known_keys(config_class)

"""config.json as transformers 5 reads it, and with the keys that transformers 4.57 reads.

The keys are those of the configuration classes of 4.57.6, where folders written like these gave the same logits as
transformers 5 in 20 of 21 (all but modernbert-decoder, by 0.019).
"""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.hf.written_config import config_of, write_config
from tests.conftest import TINY

BASE = {"rope_type": "default", "rope_theta": 777.0}
LINEAR = {"rope_type": "linear", "rope_theta": 777.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 777.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 777.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 777.0, "short_factor": [1.1] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32}
HALF = {**BASE, "partial_rotary_factor": 0.5}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
WINDOW = {"rope_type": "default", "rope_theta": 99.0}


def without(parameters: dict, *names: str) -> dict:
    return {name: value for name, value in parameters.items() if name not in ("rope_theta", *names)}


@pytest.mark.parametrize(("kind", "more", "old"), [
    ("llama", {"rope_parameters": BASE}, {"rope_theta": 777.0}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_theta": 777.0, "rope_scaling": without(LINEAR)}),
    ("llama", {"rope_parameters": YARN}, {"rope_theta": 777.0, "rope_scaling": without(YARN)}),
    ("llama", {"rope_parameters": LLAMA3}, {"rope_theta": 777.0, "rope_scaling": without(LLAMA3)}),
    ("llama", {"rope_parameters": LONG}, {"rope_theta": 777.0, "rope_scaling": without(LONG),
                                          "original_max_position_embeddings": 32}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32, "pad_token_id": 0}, {
        "rope_theta": 777.0, "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0, "rope_scaling": {
            "type": "longrope", **without(LONG, "rope_type", "original_max_position_embeddings")}}),
    ("llama", {"rope_parameters": HALF}, {"rope_theta": 777.0}),  # which turns whole heads all the same
    ("stablelm", {"rope_parameters": HALF}, {"rope_theta": 777.0, "partial_rotary_factor": 0.5}),
    ("gpt_neox", {"rope_parameters": HALF}, {"rotary_emb_base": 777.0, "rotary_pct": 0.5}),
    ("gemma3_text", {**LAYERS, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": WINDOW}}, {
        "rope_theta": 777.0, "rope_local_base_freq": 99.0, "rope_scaling": without(LINEAR)}),
    ("gemma3_text", {**LAYERS, "rope_parameters": {"full_attention": BASE, "sliding_attention": WINDOW}}, {
        "rope_theta": 777.0, "rope_local_base_freq": 99.0}),
    ("modernbert-decoder", {**LAYERS, "pad_token_id": 0, "rope_parameters": {
        "full_attention": BASE, "sliding_attention": WINDOW}}, {"global_rope_theta": 777.0, "local_rope_theta": 99.0}),
    ("gpt2", {}, {})], ids=lambda value: value if isinstance(value, str) else None)
def test_what_transformers_4_reads_lies_beside(tmp_path, kind, more, old):
    config = AutoConfig.for_model(**copy.deepcopy({**TINY, "model_type": kind, "vocab_size": 300, **more}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    write_config(config_of(model, torch.float16), tmp_path, model)
    written, read = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path)
    keys = ("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor", "rotary_pct",
            "rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta")
    assert {name: written[name] for name in keys if name in written} == old
    assert written["torch_dtype"] == written["dtype"] == "float16" and read.dtype is torch.float16
    assert written["tie_word_embeddings"] is model.config.tie_word_embeddings is read.tie_word_embeddings
    parameters = getattr(read, "rope_parameters", None)
    if kind == "phi3":
        assert parameters.pop("type") == "longrope"
    assert parameters == getattr(model.config, "rope_parameters", None)


def test_bases_that_transformers_4_has_no_keys_for_are_left_out(tmp_path):
    """Two bases where it knows of one: a wrong one would be worse than none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{
            **TINY, "model_type": "qwen3", "vocab_size": 300}))
    config = config_of(model, torch.float32)
    config.rope_parameters = {"full_attention": BASE, "sliding_attention": WINDOW}
    from strategies.export.hf.written_config import with_old_keys

    assert not {"rope_theta", "rope_scaling"} & set(with_old_keys(config, {"dtype": "float32"}, model))


def test_a_configuration_says_that_head_and_embeddings_are_two(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=300))
    assert config_of(model, torch.float32).tie_word_embeddings is True
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    assert config_of(model, torch.float32).tie_word_embeddings is False and model.config.tie_word_embeddings is True

"""A student made of layers of its teacher computes what the teacher does with its other blocks skipped, to the bit."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import TINY
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.models.layer_settings import with_layers
from trainer.models.teacher_layers import fill_from_layers, try_layers

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
FOUR = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "head_dim": 8}
KINDS = {  # with what a student of its layers 1 and 3 is to have in its configuration, where that is not the teacher's
    "llama": (FOUR, {}),
    "gpt2": ({"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
             {"n_layer": 2}),
    "openai-gpt": ({"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}, {"n_layer": 2}),
    "smollm3": ({**FOUR, "no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 0]}),
    "gemma2": ({**FOUR, "head_dim": 8, "sliding_window": 4}, {"layer_types": ["full_attention"] * 2}),
    "qwen2": ({**FOUR, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
              {"layer_types": ["full_attention", "sliding_attention"]}),
    "qwen3_moe": ({**FOUR, **EXPERTS, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
                  {"mlp_only_layers": [0]}),
    "deepseek_v3": ({**FOUR, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                     "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                     "qk_nope_head_dim": 4, "v_head_dim": 8, "num_experts_per_tok": 2}, {"first_k_dense_replace": 1}),
    "llama4_text": ({**FOUR, "num_local_experts": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2,
                     "head_dim": 8, "attention_chunk_size": 8}, {"no_rope_layers": [1, 0], "moe_layers": [0, 1]}),
    "jamba": ({**FOUR, "num_hidden_layers": 6, "attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 2,
               "expert_layer_period": 3, "expert_layer_offset": 1}, {"attn_layer_offset": 1}),
    "lfm2": ({**FOUR, "full_attn_idxs": [1, 2]}, {"full_attn_idxs": [0], "layer_types": ["full_attention", "conv"]}),
    "minicpm3": ({**FOUR, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
                  "qk_rope_head_dim": 4, "v_head_dim": 8, "scale_depth": 1.4}, {"scale_depth": 1.4 * 0.5 ** 0.5}),
    "gpt_neo": ({"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4,
                 "attention_types": [[["global", "local"], 2]]}, {"attention_layers": ["local", "local"]}),
}


def build(kind, dimensions):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **IDS, **dimensions)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    return model


@torch.no_grad()
def skipped(model, layers, ids):
    """Logits of the model itself, in plain transformers, with only these of its blocks run, each where it is."""
    blocks = next(module for module in model.modules()
                  if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers)
    for number, block in enumerate(blocks):
        if number not in layers:
            wrap = {"openai-gpt": lambda state: [state], "gpt_neo": lambda state: (state, None)}.get(
                model.config.model_type, lambda state: state)
            block.forward = lambda hidden_states, *_, wrap=wrap, **__: wrap(hidden_states)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_its_teacher_with_other_blocks_skipped(kind):
    dimensions, expected = KINDS[kind]
    teacher, layers = build(kind, dimensions), (1, 3)
    config, _ = with_layers(teacher.config, layers)
    assert config.num_hidden_layers == 2
    assert {name: getattr(config, name) for name in expected} == expected
    student = AutoModelForCausalLM.from_config(config).eval()
    fill_from_layers(student, teacher.state_dict(), teacher.config, layers, 24)
    ids = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = student(input_ids=ids, use_cache=False).logits
    theirs = skipped(teacher, layers, ids)
    assert torch.allclose(ours, theirs, rtol=0, atol=(1e-4 if kind == "gpt2" else 1e-6) * float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "dimensions", "layers", "parts"), [
    ("diffllama", FOUR, (0, 3), ["layer 3 has model.layers.self_attn.lambda_init = 0.55", "take [0, 1]"]),
    ("modernbert-decoder", {**FOUR, "cls_token_id": 0, "sep_token_id": 0}, (1, 2), ["attn_norm", "take [0, 2]"]),
    ("olmo_hybrid", FOUR, (1, 2), ["expects at least one attention layer", "take [1, 3]"]),
    ("xlm", {"emb_dim": 32, "n_layers": 4, "n_heads": 4, "causal": True, "asm": False}, (0, 3),
     ["spread over 4 lists", "give the student"])])
def test_layers_that_make_no_model_are_refused_with_others_that_do(kind, dimensions, layers, parts):
    config = AutoConfig.for_model(kind, **IDS, **dimensions)
    with pytest.raises(UserError, match="do not make a model of their own") as caught:
        try_layers(config, layers, 16)
    assert caught.value.key == "student.from_teacher" and caught.value.value == list(layers)
    assert parts[0] in caught.value.problem and parts[1] in caught.value.way_out
    if "take" in parts[1]:
        try_layers(config, tuple(int(one) for one in parts[1] if one.isdigit()), 16)


def test_layers_that_make_no_model_are_refused_before_anything_is_read(write_experiment, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "diffllama", **{**IDS, "vocab_size": 300}, **FOUR)).save_pretrained(tmp_path / "d")
    file = write_experiment(teacher={"path": str(tmp_path / "d")}, student={"architecture": None,
                                                                            "from_teacher": [1, 3]})
    with pytest.raises(UserError, match="lambda_init"):
        check_early(read_experiment(file, []).experiment)


@pytest.mark.parametrize(("stored", "held"), [
    ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float32", "float32")])
def test_layers_are_taken_as_the_file_has_them_whatever_the_teacher_is_held_in(train_here, tmp_path, stored, held):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, "vocab_size": 300})
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored)).save_pretrained(tmp_path / "teacher")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<end>"], show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>").save_pretrained(
        tmp_path / "teacher")
    trainer = train_here(teacher={"path": str(tmp_path / "teacher"), "dtype": held}, until=0,
                         data={"tokenizer": {"train_vocabulary": None}},
                         student={"architecture": None, "from_teacher": [0, 2]})
    file = load_file(tmp_path / "teacher" / "model.safetensors")
    for name, weight in trainer.unwrapped.state_dict().items():
        if name == "lm_head.weight":
            continue
        assert weight.dtype == torch.float32
        assert torch.equal(weight, file[name.replace("layers.1.", "layers.2.")].float()), name
    assert next(trainer.teacher.parameters()).dtype == getattr(torch, held)

"""Models are tried before they are trained: causal, and with documents of a row kept apart however long it is."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.models import model_trials
from trainer.models.build import build_student, from_config
from trainer.models.configs import student_config
from trainer.models.model_trials import (
    check_causal,
    check_packing,
    check_padding,
    check_positions,
    documents_stay_apart,
    is_causal,
)
from trainer.models.reload_trial import check_reload

BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64}


def build(dimensions, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
                                     **dimensions, **more})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def moves(model):
    """How far logits move when only the last token changes, run without anything of ours."""
    ids = torch.arange(1, 9)[None]
    other = torch.cat([ids[:, :-1], ids[:, -1:] + 20], 1)
    return float((model(ids).logits - model(other).logits)[0, :-1].abs().max())


@pytest.mark.parametrize(("dimensions", "flag"), [
    (BERT, "is_decoder: true"), ({**BERT, "model_type": "electra"}, "is_decoder: true"),
    ({"model_type": "xlm", "emb_dim": 32, "n_layers": 2, "n_heads": 2, "asm": False}, "causal: true"),
    ({**TINY, "model_type": "gemma3_text", "head_dim": 16, "use_bidirectional_attention": True},
     "use_bidirectional_attention: false"),
    ({"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
     "attn_type: uni")])
def test_models_that_see_later_tokens_are_refused_with_the_setting_that_helps(dimensions, flag):
    model = build(dimensions)
    assert moves(model) > 1e-4 and not is_causal(model)
    with pytest.raises(UserError, match="not causal") as caught:
        check_causal(model, "teacher", 32)
    assert f"add `{flag}` to teacher.architecture" in caught.value.way_out
    name, value = flag.split(": ")
    causal = build({**dimensions, name: {"true": True, "false": False}.get(value, value)})
    assert moves(causal) == 0 and is_causal(causal, 32)


def test_where_no_setting_helps_another_model_is_advised(monkeypatch):
    monkeypatch.setattr(model_trials, "FLAGS", ())
    with pytest.raises(UserError, match="not causal") as caught:
        check_causal(build(BERT), "student", 32)
    assert caught.value.way_out.startswith("name a causal language model")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mamba", "bloom"])
def test_causal_models_are_found_causal(kind):
    sizes = {**TINY, "model_type": kind, "num_local_experts": 4}
    model = build(sizes if kind in ("llama", "mixtral") else {"model_type": kind, "hidden_size": 32, "n_head": 2,
                                                              "n_layer": 2, "num_hidden_layers": 2})
    assert is_causal(model, 40) and model.training is False


def test_a_model_that_is_not_causal_is_refused_before_anything_is_read(write_experiment, tmp_path):
    given = read_experiment(write_experiment(), [f"student.architecture={json.dumps(BERT)}"])
    with pytest.raises(UserError, match="BertLMHeadModel is not causal") as caught:
        check_early(given.experiment)
    assert caught.value.key == "student.architecture" and "is_decoder: true" in caught.value.way_out
    build(BERT, vocab_size=300).save_pretrained(tmp_path / "bert")
    given = read_experiment(write_experiment(teacher={"path": str(tmp_path / "bert")}), [])
    with pytest.raises(UserError, match="is not causal") as caught:
        check_early(given.experiment)
    assert caught.value.key == "teacher.path" and '"is_decoder": true into its config.json' in caught.value.way_out


def test_rows_of_packed_documents_are_tried_at_their_whole_length():
    """Beyond its window this model forgets where documents end; in twelve tokens it does not show."""
    model = build(TINY)
    forward = model.model.forward

    def forgetful(input_ids, position_ids, **more):
        length = input_ids.shape[1]
        return forward(input_ids=input_ids, position_ids=position_ids if length <= 32 else torch.arange(length)[None],
                       **more)

    model.model.forward = forgetful
    assert documents_stay_apart(model) and documents_stay_apart(model, 32) and not documents_stay_apart(model, 33)
    with pytest.raises(UserError, match="would see each other in the student") as caught:
        check_packing(model, "student", 64)
    assert caught.value.way_out == "set `data.packing: false`"


@torch.no_grad()
def test_a_model_that_picks_other_keys_in_longer_rows_is_refused():
    """Doge attends to the best keys of a row, and those of a token that comes again are equally good."""
    model = build({**TINY, "model_type": "doge", "keep_window_size": 16})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.arange(30)[None] % 7
    alone, longer = model(ids).logits, model(torch.nn.functional.pad(ids, (0, 9))).logits[:, :30]
    assert (alone - longer).abs().max() > 0.02 * alone.abs().max()
    with pytest.raises(UserError, match="depends on how long its row is") as caught:
        check_padding(model, "student", 40)
    assert caught.value.key == "data.sequence_length" and "data.sequence_length=16," in caught.value.way_out
    check_padding(model, "student", 16)
    check_padding(build(TINY), "student", 40)


@pytest.mark.parametrize("kind", ["roberta", "camembert", "data2vec-text"])
def test_a_model_that_counts_positions_otherwise_is_refused(kind, write_experiment):
    """RoBERTa's first position is the number behind its padding token: a row's 0, 1, 2 are other embeddings to it."""
    dimensions = {**BERT, "model_type": kind, "is_decoder": True}
    model, ids = build(dimensions, pad_token_id=1), torch.arange(4, 12)[None]
    with torch.no_grad():
        alone = model(ids).logits
        assert torch.equal(alone, model(ids, position_ids=torch.arange(2, 10)[None]).logits)
        assert not torch.allclose(alone, model(ids, position_ids=torch.arange(8)[None]).logits, atol=1e-3)
    with pytest.raises(UserError, match="counts positions otherwise than from 0 on") as caught:
        check_positions(model, "student")
    assert caught.value.key == "student.architecture" and "llama" in caught.value.way_out
    given = read_experiment(write_experiment(), [f"student.architecture={json.dumps(dimensions)}"])
    with pytest.raises(UserError, match="counts positions otherwise"):
        check_early(given.experiment)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mamba", "opt"])
def test_models_that_count_from_0_are_taken(kind):
    sizes = {"llama": TINY, "bert": {**BERT, "is_decoder": True}}.get(kind, {
        "hidden_size": 32, "n_head": 2, "n_layer": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "word_embed_proj_dim": 32})
    known = {*AutoConfig.for_model(kind).to_dict(), *AutoConfig.for_model(kind).attribute_map}
    check_positions(build({name: value for name, value in sizes.items() if name in known}, model_type=kind), "student")


def test_a_model_with_several_widths_is_refused(write_experiment):
    given = read_experiment(write_experiment(), ['student.architecture={"model_type": "blt"}']).experiment
    with pytest.raises(UserError, match="its configuration has no `hidden_size`"):
        student_config(given.student, None, 300)


@pytest.mark.parametrize("kind", ["modernbert-decoder", "deepseek_v4", "qwen2"])
def test_a_plan_makes_every_model_without_numbers(kind, write_experiment):
    """Two of these look at numbers, or change dtypes, while they are made, which torch's fake tensors do not bear."""
    dimensions = {**TINY, "model_type": kind, "vocab_size": 300, "tie_word_embeddings": True}
    if kind == "deepseek_v4":
        dimensions |= {"head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "n_routed_experts": 4,
                       "moe_intermediate_size": 32, "index_n_heads": 4, "index_head_dim": 16, "num_key_value_heads": 1}
    known = {"model_type", *AutoConfig.for_model(kind).to_dict(), *AutoConfig.for_model(kind).attribute_map}
    given = read_experiment(write_experiment(), ["student.architecture=" + json.dumps({
        name: value for name, value in dimensions.items() if name in known})]).experiment
    config = student_config(given.student, None, 300)
    with FakeTensorMode() as mode:
        fake = from_config(config, given.form.trust)
    real = from_config(config, given.form.trust)

    def shapes(model):
        return {name: (tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.requires_grad)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    assert shapes(fake) == shapes(real)
    assert all(tensor.fake_mode is mode for tensor in (*fake.parameters(), *fake.buffers()))
    if kind == "modernbert-decoder":  # whose class has to have such tokens
        tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=2, pad_token_id=2)
        student = build_student(given, config, None, tokenizer)
        assert (student.config.bos_token_id, student.config.eos_token_id, student.config.pad_token_id) == (2, 2, 2)
        assert student.get_input_embeddings().padding_idx is None  # else the end of a text would not learn as input
    heads = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (fake, real)]
    assert heads[0] == heads[1]


def test_a_model_that_transformers_loads_otherwise_than_it_saved_it_is_refused(write_experiment):
    """Youtu's padding row is zeros after each load; the way out is tried."""
    dimensions = {**TINY, "model_type": "youtu", "head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
                  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2,
                  "pad_token_id": 3, "vocab_size": 300}
    model = build({name: value for name, value in dimensions.items() if name != "model_type"}, model_type="youtu")
    with pytest.raises(UserError, match="loads model.embed_tokens.weight of YoutuForCausalLM otherwise") as refused:
        check_reload(model, "student", "folder")
    assert '"pad_token_id": null' in refused.value.way_out
    model.config.pad_token_id = None
    check_reload(model, "student", "folder")


@pytest.mark.parametrize("kind", ["mamba2", "gpt2"])
def test_a_model_that_comes_back_is_taken(kind):
    """Mamba-2's configuration has an infinite number."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "num_heads": 4, "head_dim": 16,
             "state_size": 8, "n_groups": 1, "n_head": 2, "n_layer": 2}
    known = {*AutoConfig.for_model(kind).to_dict(), *AutoConfig.for_model(kind).attribute_map}
    check_reload(build({name: value for name, value in sizes.items() if name in known}, model_type=kind), "student")


def test_a_model_that_transformers_cannot_load_again_is_refused():
    config = AutoConfig.for_model("mllama")
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": [], "pad_token_id": 0}
    config = type(config)(text_config={**config.text_config.to_dict(), **text})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="cannot load what it saves of MllamaForCausalLM"):
        check_reload(model, "student", "folder")

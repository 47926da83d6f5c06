"""Models as people publish them: multimodal, quantized already, with code of their own; and what is no causal model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from strategies.export.transformers_folder import write_folder
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from trainer.errors import UserError
from trainer.experiment.nodes import Model
from trainer.experiment.reading import read_experiment
from trainer.model_origin import skeleton
from trainer.models import _config, _load, build_student, student_of
from trainer.plan import make_plan

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SEEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}
IDS = torch.arange(3, 20)[None]


def loaded(folder, dtype=torch.float32):
    model = Model(path=str(folder))
    config = _config(model, "student", None, offline=False)
    assert getattr(config, "quantization_config", None) is None
    return _load(model, "student", config, dtype)


class Nothing:
    def save_pretrained(self, folder):
        pass


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.mark.parametrize("make", [
    lambda: Gemma3ForConditionalGeneration(Gemma3Config(
        text_config={**SMALL, "head_dim": 16, "sliding_window": 8}, vision_config=SEEN, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92)),
    lambda: LlavaForConditionalGeneration(LlavaConfig(
        text_config={**SMALL, "model_type": "llama"}, vision_config={**SEEN, "model_type": "clip_vision_model",
                                                                    "projection_dim": 32}, image_token_index=90))])
def test_of_a_multimodal_model_the_language_model_is_used(make, tmp_path):
    torch.manual_seed(0)
    whole = make()
    whole.save_pretrained(tmp_path)
    alone = loaded(tmp_path)
    assert torch.equal(logits(alone), logits(whole))
    assert alone.config.vocab_size == 96 and not any("vision" in name for name in alone.state_dict())


def test_weights_that_are_packed_are_those_that_they_compute_with(llama, tmp_path):
    mixed = [("*.mlp.*", WeightQuantizer(8, None, torch.float32))]
    prepare(llama, WeightQuantizer(4, 32, torch.float32), ("lm_head",), mixed)
    write_folder(tmp_path / "packed", llama, Nothing())
    plain = loaded(tmp_path / "packed")
    assert torch.allclose(logits(plain), logits(llama), atol=1e-5)
    assert {type(module) for module in plain.modules() if "Linear" in type(module).__name__} == {torch.nn.Linear}
    used = llama.model.layers[1].mlp.up_proj.effective_weight
    assert torch.allclose(plain.model.layers[1].mlp.up_proj.weight, used, atol=1e-7)


def test_weights_of_8_bit_floats_are_multiplied_with_the_scales_of_their_blocks(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if "proj" in name:
            scale = weight.reshape(weight.shape[0] // 32, 32, weight.shape[1] // 32, 32).abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            tensors[name] = (weight / wide).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"], expected[name] = scale, tensors[name].float() * wide
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    quantized(tmp_path, quant_method="fp8", weight_block_size=[32, 32], activation_scheme="dynamic", fmt="e4m3")
    plain = loaded(tmp_path).state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.allclose(plain[name], weight, rtol=1e-2), name  # transformers may round to bfloat16
        assert plain[name].dtype == torch.float32


def quantized(folder, **how):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


def test_a_model_with_code_of_its_own_is_made_again_and_exported_with_its_code(llama, tmp_path, write_experiment):
    origin, code = tmp_path / "own", "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    llama.save_pretrained(origin)
    (origin / "configuration_own.py").write_text(f"from transformers import LlamaConfig\n{code}")
    (origin / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    config = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": {
        "AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}))
    with pytest.raises(UserError, match="custom code"):
        loaded(origin)
    experiment = read_experiment(write_experiment(student={"architecture": None, "path": str(origin),
                                                           "trust_remote_code": True})).experiment
    config = _config(experiment.student, "student", None, offline=False)
    student = _load(experiment.student, "student", config, torch.float32)
    assert type(student_of(experiment, config)).__name__ == type(student).__name__ == "OwnForCausalLM"
    write_folder(tmp_path / "exported", student, Nothing())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert torch.equal(logits(again), logits(llama))


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "something"])
def test_quantized_weights_that_cannot_be_read_are_refused_by_the_configuration_alone(llama, tmp_path, method):
    llama.save_pretrained(tmp_path)
    quantized(tmp_path, quant_method=method, bits=4)
    with pytest.raises(UserError, match="quantized") as refused:
        _config(Model(path=str(tmp_path)), "teacher", None, offline=True)
    assert refused.value.key == "teacher.path" and "made from" in refused.value.way_out


@pytest.mark.parametrize("architecture, said", [
    ({"model_type": "modernbert"}, "no causal language model"), ({"model_type": "t5"}, "encodes one text"),
    ({"model_type": "blip"}, "multimodal"), ({"model_type": "vit"}, "no causal language model"),
    ({"model_type": "llama", "num_hidden_layers": 0}, "no layers"),
    ({"model_type": "llama", "num_key_value_heads": -4}, "cannot be made"),
    ({"model_type": "llama", "hidden_size": "64"}, "expected int"),
    ({"model_type": "llama", "hidden_act": "none"}, "KeyError: 'none'"),
    ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "cannot be made")])
def test_what_is_no_causal_language_model_is_refused_in_one_short_message(architecture, said):
    with pytest.raises(UserError, match=said) as refused, torch.device("meta"):
        skeleton(_config(Model(architecture=architecture), "student", 96, offline=True), torch.float32)
    assert len(str(refused.value)) < 200 and refused.value.key.startswith("student.architecture")


def test_a_token_that_ends_and_pads_learns_as_input(tmp_path, llama, write_experiment):
    with torch.no_grad():
        llama.model.embed_tokens.weight[2] = 0.5
    ids, found = torch.tensor([[5, 6, 2, 7, 8, 2]]), {}
    llama(input_ids=ids, labels=ids).loss.backward()  # its configuration has no padding token
    llama.config.pad_token_id = llama.config.eos_token_id = 2
    llama.save_pretrained(tmp_path / "model")
    for name, quantization in {"loaded": None, "quantized": {"bits": 8, "embeddings": True, "ignore": []}}.items():
        experiment = read_experiment(write_experiment(name, student={
            "architecture": None, "path": str(tmp_path / "model"), "quantization": quantization})).experiment
        config = _config(experiment.student, "student", None, offline=False)
        student = build_student(experiment, config, None, None)
        student(input_ids=ids, labels=ids).loss.backward()
        found[name] = student.get_input_embeddings().weight.grad[2]
        assert student.config.pad_token_id == student_of(experiment, config).config.pad_token_id == 2
        assert student_of(experiment, config).get_input_embeddings().padding_idx is None
    assert torch.allclose(found["loaded"], llama.model.embed_tokens.weight.grad[2], atol=1e-7)
    assert found["quantized"].abs().max() > 1e-4


def test_special_tokens_outside_of_the_vocabulary_are_none(tmp_path, llama):
    made = _config(Model(architecture={"model_type": "phi3", **SMALL}), "student", None, offline=True)
    assert made.pad_token_id is None and made.eos_token_id is None
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": -1, "eos_token_id": [2, 500]}))
    found = loaded(tmp_path)
    assert found.config.pad_token_id is None and found.config.eos_token_id == [2]


def test_a_teacher_is_as_large_as_its_files_in_the_plan_too(tmp_path, llama, write_experiment):
    llama.save_pretrained(tmp_path / "teacher")
    experiment = read_experiment(write_experiment(teacher={"path": str(tmp_path / "teacher"), "dtype": "bfloat16"},
                                                  student={"from_teacher": [0], "architecture": None})).experiment
    config = _config(experiment.teacher, "teacher", None, offline=True)
    plan = make_plan(experiment, config, config, processes=1, device="cpu", rows=None)
    assert plan.teacher_bytes == (tmp_path / "teacher" / "model.safetensors").stat().st_size

"""Models as people publish them: multimodal, quantized already, with code of their own; and what is no causal model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from strategies.export.hf.transformers_folder import write_folder
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.trainer.teacher.test_distilling import END, bpe
from tests.trainer.test_bad_input import refused
from trainer.data.dataset import prepare_text
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.experiment.model_nodes import Model
from trainer.models.build import _load, build_student, empty_student
from trainer.models.configs import _config
from trainer.models.model_origin import skeleton
from trainer.planning.plan import Plans

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


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_that_says_something_else_than_the_whole_is_refused(tmp_path):
    """transformers 5.24 scales the logits of Cohere2 alone by 1/16, and not those of the model that sees."""
    whole = Cohere2VisionForConditionalGeneration(Cohere2VisionConfig(
        text_config={**SMALL, "model_type": "cohere2", "sliding_window": 8, "pad_token_id": 0, "logit_scale": 0.0625},
        vision_config={**SEEN, "model_type": "siglip_vision_model"}, image_token_id=90))
    whole.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="something else of text.*0.94 of the largest") as told:
        loaded(tmp_path)
    assert told.value.key == "student.path" and "text alone" in told.value.way_out
    asked = Cohere2VisionConfig.from_pretrained(tmp_path).get_text_config()
    alone = AutoModelForCausalLM.from_config(asked)
    alone.load_state_dict({name.replace("model.language_model.", "model."): weight for name, weight in
                           whole.state_dict().items() if "language_model" in name}, strict=False)
    alone.tie_weights()
    assert torch.allclose(logits(alone), logits(whole) * 0.0625, atol=1e-6)


def seeing(folder, **changes):
    """A model of text and images in a folder, with a tokenizer of 300 tokens."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(300), eos_token=END, pad_token=END)
    whole = LlavaForConditionalGeneration(LlavaConfig(
        text_config={**SMALL, "vocab_size": 301, "model_type": "llama"},
        vision_config={**SEEN, "model_type": "clip_vision_model", "projection_dim": 32}, **changes))
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return whole.eval(), tokenizer


def test_a_teacher_that_sees_is_compared_with_its_student(tmp_path, run_experiment):
    whole, _ = seeing(tmp_path / "teacher", image_token_index=300)
    experiment, folder = run_experiment(
        teacher={"path": str(tmp_path / "teacher"), "dtype": "float32"},
        student={"architecture": None, "from_teacher": [0]},
        data={"tokenizer": {"train_vocabulary": None}}, report={"control": False},
        training={"steps": 1, "evaluate_every": 1, "checkpoint_every": 1})
    held = prepare_text(experiment).held_out
    with torch.no_grad():
        said = whole(**{name: held[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits.double()
    nats = torch.nn.functional.cross_entropy(said.flatten(0, 1), held["targets"].flatten(), reduction="sum")
    found = json.loads(folder.comparison.read_text())["teacher"]
    assert found["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / int(held["bytes"].sum()), rel=1e-5)


def test_text_with_tokens_in_whose_place_images_are_put_is_refused(tmp_path, write_experiment):
    seeing(tmp_path / "seeing", image_token_index=bpe(300).encode("The cat").ids[0])
    file = write_experiment(student={"architecture": None, "path": str(tmp_path / "seeing")},
                            data={"tokenizer": {"train_vocabulary": None}})
    refused(file, tmp_path, parts=["student.path", "in whose place", "take that token out"])


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


@pytest.mark.parametrize("how", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                                 {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_weights_of_bitsandbytes_are_those_that_it_dequantizes(llama, tmp_path, how):
    bnb = pytest.importorskip("bitsandbytes")
    llama.save_pretrained(tmp_path / "plain")
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32)
    small.save_pretrained(tmp_path / "small")
    found, plain = loaded(tmp_path / "small").state_dict(), llama.state_dict()
    for name, layer in small.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            right, near = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float(), 2e-4
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weight = plain[f"{name}.weight"].double()
            step = weight.abs().amax(1, keepdim=True) / 127  # of each output channel
            right, near = ((weight / step).round() * step).float(), 1.01 * float(step.max())  # made of fp16
        else:
            continue
        assert torch.allclose(found[f"{name}.weight"], right, atol=near), name
        assert not torch.allclose(found[f"{name}.weight"], plain[f"{name}.weight"], atol=1e-6)
    assert torch.equal(found["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_experts_of_4_bit_floats_are_read_to_the_bit(tmp_path):
    """Codes of e2m1, the first of two in the low half of a byte, times powers of two that 32 share (OCP MX 1.0)."""
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(**{**SMALL, "intermediate_size": 32}, head_dim=16, num_local_experts=2,
                                   num_experts_per_tok=1, sliding_window=8)).save_pretrained(tmp_path)
    tensors, right = load_file(tmp_path / "model.safetensors"), {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        numbers = values[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
        right[name] = numbers.flatten(-2).transpose(1, 2)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    quantized(tmp_path, quant_method="mxfp4", modules_to_not_convert=["self_attn", "router", "embed_tokens", "lm_head"])
    found = loaded(tmp_path).state_dict()
    assert len(right) == 4 and all(torch.equal(found[name], weight) for name, weight in right.items())


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
    assert type(empty_student(experiment.form, config)).__name__ == type(student).__name__ == "OwnForCausalLM"
    write_folder(tmp_path / "exported", student, Nothing())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert torch.equal(logits(again), logits(llama))


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "something"])
def test_quantized_weights_that_cannot_be_read_are_refused_by_the_configuration_alone(llama, tmp_path, method):
    llama.save_pretrained(tmp_path)
    quantized(tmp_path, quant_method=method, bits=4)
    with pytest.raises(UserError, match="quantized") as told:
        _config(Model(path=str(tmp_path)), "teacher", None, offline=True)
    assert told.value.key == "teacher.path" and "made from" in told.value.way_out


@pytest.mark.parametrize("architecture, said", [
    ({"model_type": "modernbert"}, "no causal language model"), ({"model_type": "t5"}, "encodes one input"),
    ({"model_type": "blip"}, "multimodal"), ({"model_type": "vit"}, "no causal language model"),
    ({"model_type": "llama", "num_hidden_layers": 0}, "no layers"),
    ({"model_type": "llama", "num_key_value_heads": -4}, "cannot be made"),
    ({"model_type": "llama", "hidden_size": "64"}, "expected int"),
    ({"model_type": "llama", "hidden_act": "none"}, "KeyError: 'none'"),
    ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "cannot be made")])
def test_what_is_no_causal_language_model_is_refused_in_one_short_message(architecture, said):
    with pytest.raises(UserError, match=said) as told, torch.device("meta"):
        skeleton(_config(Model(architecture=architecture), "student", 96, offline=True), torch.float32)
    assert len(str(told.value)) < 200 and told.value.key.startswith("student.architecture")


def test_what_the_architecture_does_not_train_stays_fixed(tmp_path, write_experiment):
    """Sinusoidal positions; transformers trains them once a model is loaded, and so did we."""
    config = AutoConfig.for_model("pegasus", vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=2,
                                  decoder_ffn_dim=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                                  max_position_embeddings=64, pad_token_id=0, eos_token_id=1)
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.save_pretrained(tmp_path / "model")
    experiment = read_experiment(write_experiment(student={
        "architecture": None, "path": str(tmp_path / "model")})).experiment
    student = build_student(experiment, _config(experiment.student, "student", None, offline=False), None, None)
    fixed = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert fixed == {"model.decoder.embed_positions.weight"}
    assert {name for name, parameter in student.named_parameters() if not parameter.requires_grad} == fixed


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
        assert student.config.pad_token_id == empty_student(experiment.form, config).config.pad_token_id == 2
        assert empty_student(experiment.form, config).get_input_embeddings().padding_idx is None
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
    plan = Plans().resolve(experiment, Topology(), config, config)
    assert plan.teacher_bytes == (tmp_path / "teacher" / "model.safetensors").stat().st_size

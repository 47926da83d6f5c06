"""Further runtimes that read a student's files on a text that turns every rotary frequency."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.gguf.gguf_file import dequantized_reference, write_gguf
from strategies.export.gguf.gguf_rounding import rounded_reference
from strategies.export.hf.ctranslate2_folder import check_ctranslate2, write_ctranslate2
from strategies.export.onnx.onnx_folder import write_onnx
from strategies.export.readers import MOST, READERS, check_reader, is_installed, long_text, read_by, slowest_turn
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.strategies.export.gguf.test_gguf_file import MORE, SIZE, trained

BASE, WIDTH = 100.0, 64
LONGEST = 2 * math.pi * BASE ** ((WIDTH - 2) / WIDTH)  # wavelength of the slowest pair, in tokens
SHAPES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": WIDTH, "max_position_embeddings": 1024, "vocab_size": SIZE + MORE}
LLAMA3 = {"rope_type": "llama3", "rope_theta": BASE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
needs = {name: pytest.mark.skipif(not is_installed(reader.package), reason=f"pip install 'limbeck[{name}]'")
         for name, reader in READERS.items()}


def build(kind: str = "llama", **more):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, **{"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
                 **SHAPES, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # attention that sees where a token is
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model


def quantized(model, scale_dtype, **how):
    prepare(model, WeightQuantizer(scale_dtype=scale_dtype, **how))
    return model


def prepared(*how, **more):
    model = build()
    prepare(model, *how, **more)
    return model


def with_base(model, base: float):
    """The same weights with another base of the rotary frequencies."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def ids() -> torch.Tensor:
    return torch.randint(0, SIZE, (3, 200), generator=torch.Generator().manual_seed(0))


def read(name, tmp_path, written, reference, dtype=torch.float32, tolerance=1e-4):
    """The receipt of a reader for a written student, beside a reference."""
    path, tokenizer = tmp_path / "student.gguf", trained()
    if name == "openvino":
        path = tmp_path / "student"
        write_onnx(path, written, tokenizer, dtype)
    elif name == "ctranslate2":
        path = tmp_path / "student"
        write_ctranslate2(path, written, tokenizer, dtype)
    else:
        write_gguf(path, written, tokenizer, dtype)
    files = [path] if path.is_file() else [*path.glob("*.onnx*"), *path.glob("*.bin")]
    return read_by(name, path, files, reference, ids(), tolerance, threads=1,
                   letter=tokenizer.convert_tokens_to_ids("a"))


def test_a_text_is_as_long_as_the_slowest_turn_or_the_context():
    text = long_text(build(), ids())
    assert text.shape == (1, math.ceil(LONGEST)) and torch.equal(text[0, :600], ids().flatten()[:len(text[0])])
    assert slowest_turn(build(), text.shape[1]) == pytest.approx(1, abs=2e-3)
    assert long_text(build(max_position_embeddings=300), ids()).shape[1] == 299
    far = build(max_position_embeddings=10**6, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert long_text(far, ids()).shape[1] == MOST and slowest_turn(far, MOST) < 0.01
    assert long_text(build("gpt2", n_embd=32, n_head=2, n_layer=1, max_position_embeddings=64), ids()).shape[1] == 63


def test_what_is_not_there_is_said_by_name(monkeypatch):
    with pytest.raises(ValueError, match="llama-cpp reads what is exported for gguf, which `export.to` does not name"):
        check_reader("llama-cpp", ["onnx"])
    monkeypatch.setattr("strategies.export.readers.is_installed", lambda _: False)
    with pytest.raises(ValueError, match=r"openvino needs .+ not installed: pip install 'limbeck\[openvino\]'"):
        check_reader("openvino", ["onnx"])


@needs["llama-cpp"]
@pytest.mark.parametrize(("kind", "rope"), [
    ("llama", {"rope_type": "default", "rope_theta": BASE}), ("llama", LLAMA3),
    ("qwen3", {"rope_type": "linear", "rope_theta": BASE, "factor": 2.0})])
def test_llama_cpp_reads_the_same_and_another_base_is_found(tmp_path, kind, rope):
    model = build(kind, rope_parameters=rope)
    receipt = read("llama-cpp", tmp_path, model, rounded_reference(model, torch.float32))
    assert receipt.holds and receipt.argmax_agreement == 1 and receipt.tokens > 500, receipt
    assert receipt.slowest_turn >= (0.99 if rope["rope_type"] == "default" else 0.1)
    wrong = read("llama-cpp", tmp_path, with_base(model, BASE * 1.01), model)
    assert not wrong.holds and wrong.largest_difference > 10 * receipt.largest_difference, wrong


@needs["llama-cpp"]
@pytest.mark.parametrize(("how", "dtype"), [
    (None, torch.float16), (None, torch.bfloat16), ({"bits": 4, "group_size": 32}, torch.float16),
    ({"bits": 8, "group_size": 32}, torch.float16)])
def test_llama_cpp_rounds_what_enters_a_layer_as_its_reference(tmp_path, how, dtype):
    model = build() if how is None else quantized(build(), torch.float16, **how)
    plain, rounded = dequantized_reference(model, dtype), rounded_reference(model, dtype)
    receipt = read("llama-cpp", tmp_path, model, rounded, dtype, 2e-2)
    far = read("llama-cpp", tmp_path, model, plain, dtype, 2e-2)
    assert receipt.holds and receipt.mean_difference < far.mean_difference, (receipt, far)
    wrong = read("llama-cpp", tmp_path, model, with_base(rounded, BASE * 1.1), dtype, 2e-2)
    assert not wrong.holds, wrong


@needs["openvino"]
def test_openvino_reads_the_same_and_another_base_is_found(tmp_path):
    model = build(rope_parameters=LLAMA3, num_hidden_layers=1)
    receipt = read("openvino", tmp_path, model, model)
    assert receipt.holds and receipt.argmax_agreement == 1 and receipt.tokens > 500, receipt
    files = sorted((tmp_path / "student").glob("*.onnx*"))
    for wrong in (with_base(model, BASE), build(rope_parameters={**LLAMA3, "rope_theta": 1.01 * BASE},
                                                num_hidden_layers=1)):
        found = read_by("openvino", tmp_path / "student", files, wrong, ids(), 1e-4, threads=1)
        assert not found.holds and found.largest_difference > 10 * receipt.largest_difference, found


@needs["openvino"]
def test_openvino_unpacks_numbers_that_are_rounded_when_the_file_is_loaded(tmp_path):
    """It takes a shift of bytes for a division, and rounds where a rest is left: the graph leaves none."""
    model = quantized(build(num_hidden_layers=1), torch.float16, bits=4, group_size=32)
    reference = freeze_quantized(copy.deepcopy(model), torch.float16).float()
    receipt = read("openvino", tmp_path, model, reference, torch.float16, 2e-3)
    assert receipt.holds and receipt.argmax_agreement == 1, receipt


@needs["ctranslate2"]
@pytest.mark.parametrize(("kind", "more", "dtype"), [
    ("llama", {"attention_bias": True, "mlp_bias": True}, torch.float32), ("qwen3", {"head_dim": 32}, torch.float16),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": BASE, "factor": 2.0}}, torch.bfloat16)])
def test_ctranslate2_reads_the_same_and_another_base_is_found(tmp_path, kind, more, dtype):
    model = freeze_quantized(build(kind, **more), dtype).float()
    receipt = read("ctranslate2", tmp_path, model, model, dtype)
    assert receipt.holds and receipt.argmax_agreement == 1 and receipt.tokens > 100, receipt
    wrong = read_by("ctranslate2", tmp_path / "student", [], with_base(model, 1.01 * BASE), ids(), 1e-4, threads=1)
    assert not wrong.holds and wrong.largest_difference > 10 * receipt.largest_difference, wrong


@needs["ctranslate2"]
@pytest.mark.parametrize(("kind", "dtype", "how"), [
    ("llama", torch.bfloat16, {"bits": 8}), ("qwen2", torch.float32, {"bits": 4, "per_tensor": True})])
def test_ctranslate2_holds_the_integers_and_scales_of_a_quantized_student(tmp_path, kind, dtype, how):
    model = build(kind)
    prepare(model, WeightQuantizer(scale_dtype=dtype, **how), embeddings=True, ignore=())
    reference = dequantized_reference(model, dtype)
    receipt = read("ctranslate2", tmp_path, model, reference, dtype)
    assert receipt.holds and receipt.argmax_agreement == 1, receipt
    file, layer = (tmp_path / "student" / "model.bin").read_bytes(), model.model.layers[1]
    for one in (layer.mlp.down_proj, layer.self_attn.k_proj):
        assert one.numbers().min() == -2 ** (how["bits"] - 1) and one.numbers().to(torch.int8).numpy().tobytes() in file
    assert len(file) < 1.2 * sum(parameter.numel() for parameter in reference.parameters())
    wrong = read_by("ctranslate2", tmp_path / "student", [], with_base(reference, 1.01 * BASE), ids(), 1e-4, threads=1)
    assert not wrong.holds, wrong


@pytest.mark.parametrize(("model", "says"), [
    (lambda: build(rope_parameters=LLAMA3), "ignores how rope_type llama3 scales positions"),
    (lambda: build(head_dim=32), "not of 32"), (lambda: build("mistral"), "mistral models are not written for"),
    (lambda: build(hidden_act="gelu"), "not gelu"),
    (lambda: quantized(build(), torch.float32, bits=8, group_size=32), "groups of 32, and CTranslate2 holds symmetric"),
    (lambda: quantized(build(), torch.float32, bits=8, symmetric=False), "zero points, .* set `group_size: null`"),
    (lambda: prepared(WeightQuantizer(8), activations=ActivationQuantizer()), "quantized activations, and CTranslate2"),
    (lambda: prepared(WeightQuantizer(8), ignore=("*k_proj", "lm_head")), "k_proj beside it is not"),
    (lambda: prepared(WeightQuantizer(kind="fp8")), "has fp8 numbers")])
def test_what_ctranslate2_would_compute_otherwise_is_refused(model, says, monkeypatch):
    monkeypatch.setattr("strategies.export.hf.ctranslate2_folder.is_installed", lambda _: True)
    with pytest.raises(ValueError, match=says):
        check_ctranslate2(model())


def test_ctranslate2_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("strategies.export.hf.ctranslate2_folder.is_installed", lambda _: False)
    with pytest.raises(ValueError, match=r"pip install 'limbeck\[ctranslate2\]'"):
        check_ctranslate2(build())


@needs["ctranslate2"]
def test_ctranslate2_leaves_the_scaling_of_llama3_out_and_its_receipt_would_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.export.hf.ctranslate2_folder.ROPE", ("llama3",))
    model = build(rope_parameters=LLAMA3)
    assert not read("ctranslate2", tmp_path, model, model).holds

"""Weights outside of `nn.Linear`, quantized: experts that one module holds, and GPT-2's matrices of the other shape."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.export.hf.transformers_folder import check_folder, write_folder
from strategies.export.sizes import exported_bytes
from strategies.quantization import post_training
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.qat import prepare, quantized_layers, set_bits
from strategies.quantization.quantizer import WeightQuantizer
from strategies.quantization.sensitivity import measure
from tests.strategies.export.hf.test_saved_names import mixture
from tests.strategies.export.hf.test_transformers_folder import Tokenizer

IDS = torch.arange(48).view(4, 12) % 96


def gpt2():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def built(kind: str):
    return gpt2() if kind == "gpt2" else mixture(kind)


def nearest(matrix: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Each weight of (outputs, inputs) the nearest multiple of its group's scale, one group after the other."""
    found = matrix.clone()
    for row in found:
        for begin in range(0, len(row), group):
            part = row[begin:begin + group]
            scale = -part[part.abs().argmax()] / 2 ** (bits - 1)  # the largest weight falls on the number below
            part.copy_((part / scale).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1) * scale)
    return found


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "phimoe"])
@pytest.mark.parametrize("asked", [{"bits": 4, "group_size": 16}, {"bits": 3, "rule": "learned"}, {"kind": "fp8"}],
                         ids=str)
def test_it_reloads_packed_in_plain_transformers(kind, asked, tmp_path):
    model = built(kind)
    prepare(model, WeightQuantizer(**asked))
    with torch.no_grad():
        trained = model(IDS).logits
        write_folder(tmp_path / "student", model, Tokenizer())
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
        assert torch.equal(reloaded(IDS).logits, trained)
        assert torch.equal(freeze_quantized(copy.deepcopy(model), torch.float32)(IDS).logits, trained)
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == exported_bytes(model, torch.float32)
    whole = {name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()
             and tensor.dtype is not torch.float8_e4m3fn and not name.endswith("_scale")}
    assert all("embed" in name or "wte" in name or "wpe" in name or "gate" in name or "router" in name
               or "lm_head" in name for name in whole), whole


def test_each_expert_has_the_grid_it_would_have_alone():
    model = mixture("mixtral").double()
    model.set_experts_implementation("eager")  # torch's grouped product, the usual one, is of no double precision
    plain = copy.deepcopy(model)
    prepare(model, WeightQuantizer(bits=4, group_size=16, scale_dtype=torch.float64))
    for layer in plain.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            for expert in getattr(layer.mlp.experts, name).data:
                expert.copy_(nearest(expert, 4, 16))
        for name in "qkvo":
            weight = getattr(layer.self_attn, f"{name}_proj").weight.data
            weight.copy_(nearest(weight, 4, 16))
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, rtol=1e-12, atol=1e-12)


def test_matrices_of_inputs_by_outputs_have_groups_of_inputs():
    model = gpt2().double()
    plain = copy.deepcopy(model)
    prepare(model, WeightQuantizer(bits=4, group_size=16, scale_dtype=torch.float64))
    for block in plain.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight.data.copy_(nearest(layer.weight.data.T, 4, 16).T)
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_its_weights_and_learned_scales_are_trained(kind):
    model = built(kind).train()
    names = prepare(model, WeightQuantizer(bits=3, rule="learned", group_size=16))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    kept = [name for name in before if "log_ratio" in name]
    assert len(kept) == len(names) and set(kept) <= moved and all(before[name].ndim == 1 for name in kept)
    assert {name if "experts" in name else f"{name}.weight" for name in names} <= moved
    again = built(kind)
    prepare(again, WeightQuantizer(bits=3, rule="learned", group_size=16))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    set_bits(model, 8)
    assert {layer.quantizer.bits for _, layer in quantized_layers(model)} == {8}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["gpt2", "olmoe"])
@torch.no_grad()
def test_after_training_it_is_rounded_and_reloads(kind, method, tmp_path):
    model = built(kind)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    batches = [{"input_ids": torch.randint(0, 96, (8, 32))}]
    names = post_training.quantize(model, batches, WeightQuantizer(bits=4, group_size=16), method=method)
    assert sum("experts" in name for name in names) == (0 if kind == "gpt2" else 4)
    found = {name: layer.effective_weight for name, layer in quantized_layers(model)}
    for name in names:
        own = before[name if "experts" in name else f"{name}.weight"]
        rows = own.flatten(0, -2) if "experts" in name else own.T if kind == "gpt2" else own
        fits = nearest(rows, 4, 16)
        mine = found[name].flatten(0, -2) if "experts" in name else found[name].T if kind == "gpt2" else found[name]
        if method == "rtn" or "experts" in name:
            assert torch.allclose(mine, fits, atol=1e-6)
        else:
            assert not torch.equal(mine, fits) and (mine - rows).norm() < 2 * (fits - rows).norm()
    write_folder(tmp_path / "student", model, Tokenizer())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_it_is_measured_like_any_other_layer():
    model = mixture("mixtral")
    before, logits = copy.deepcopy(model), model(IDS).logits
    found = measure(model, [None, WeightQuantizer(bits=4, group_size=16)], lambda model: float(
        (model(IDS).logits - logits).abs().sum()))
    assert found.layers[4] == ("model.layers.0.mlp.experts.gate_up_proj",) and (found.rises[:, 1] > 0).all()
    assert torch.equal(model(IDS).logits, logits) and all(map(torch.equal, model.parameters(), before.parameters()))


@pytest.mark.parametrize(("kind", "asked", "more", "said"), [
    ("mixtral", {"bits": 4, "symmetric": False}, {}, "symmetric"),
    ("mixtral", {"bits": 4, "per_tensor": True}, {}, "a scale for each output or group"),
    ("mixtral", {"kind": "fp8", "group_size": 16}, {}, "of fp8 for each output"),
    ("mixtral", {"bits": 8}, {"activations": ActivationQuantizer()}, "quantizes its activations"),
    ("mixtral", {"bits": 4}, {"rules": [("*.down_proj", WeightQuantizer(bits=8))]}, "other numbers than other experts"),
    ("granitemoe", {"bits": 4}, {}, "one tensor of all experts in files of this architecture"),
    ("llama4_text", {"bits": 4}, {}, "makes other modules of Llama4TextExperts"),
    ("gpt2", {"bits": 4, "symmetric": False}, {}, "no place for zero points"),
    ("gpt2", {"bits": 8}, {"activations": ActivationQuantizer()}, "stored (inputs, outputs), which transformers loads"),
    ("gpt2", {"bits": 4}, {"rules": [("*.c_fc", WeightQuantizer(bits=8))]}, "has other numbers"),
])
def test_what_transformers_would_not_read_is_refused(kind, asked, more, said):
    model = built(kind)
    prepare(model, WeightQuantizer(**asked), **more)
    with pytest.raises(ValueError, match=said.replace("(", "\\(").replace(")", "\\)")):
        check_folder(model)


@torch.no_grad()
def test_experts_may_have_other_numbers_than_the_rest(tmp_path):
    model = mixture("mixtral")
    prepare(model, WeightQuantizer(bits=8, group_size=16), rules=[("*.experts.*", WeightQuantizer(bits=3))])
    write_folder(tmp_path / "student", model, Tokenizer())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_experts_that_are_left_out_reload_beside_quantized_layers(tmp_path):
    model = mixture("mixtral")
    prepare(model, WeightQuantizer(bits=4, group_size=16), ignore=("lm_head", "*.gate_up_proj"))
    write_folder(tmp_path / "student", model, Tokenizer())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()(IDS).logits, model(IDS).logits)

"""Adapters on a frozen base, beside peft, bitsandbytes and dense products."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.adapters.frozen_weights import GivenNumbers, PackedLinear, product
from strategies.adapters.low_rank import LowRank, attach, base_of, merged, target_names
from strategies.common.frozen_base import base_digest, base_names
from strategies.memory.ledger import parameter_bytes
from strategies.quantization.given_numbers import hold_numbers, packed_numbers
from strategies.quantization.post_training import quantize
from strategies.quantization.quantizer import WeightQuantizer

LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES = {"llama": LLAMA, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
          "mixtral": {**LLAMA, "num_local_experts": 4, "tie_word_embeddings": False}}
IDS = torch.arange(24).view(2, 12)


def model(kind="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=97, **SHAPES[kind])).eval()


def logits(one):
    return one(input_ids=IDS).logits


def moved(one):
    """With adapters that are no longer zero."""
    torch.manual_seed(1)
    for parameter in one.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 20
    return one


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("architecture, kind", [("llama", "lora"), ("llama", "dora"), ("gpt2", "dora"),
                                                ("mixtral", "lora")])
@torch.no_grad()
def test_begins_as_its_base_and_merges_to_what_it_computes(architecture, kind, base):
    if architecture == "gpt2" and base in ("int8", "nf4"):
        with pytest.raises(ValueError, match="Conv1D, and .* numbers are for linear layers"):
            attach(model(architecture), LowRank(kind, 4, 8, base=base))
        return
    whole = model(architecture)
    one = attach(model(architecture), LowRank(kind, 4, 8, base=base)).eval()
    begun = logits(one)
    torch.testing.assert_close(begun, logits(whole), rtol=0, atol={"float32": 0, "bfloat16": 5e-3, "int8": 8e-3,
                                                                   "nf4": 0.2}[base])
    torch.testing.assert_close(logits(base_of(one)), begun, rtol=0, atol=1e-6)
    adapted = logits(moved(one))
    assert (adapted - begun).abs().max() > 0.1
    torch.testing.assert_close(logits(merged(one, model(architecture))), adapted, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(base_of(one)), begun, rtol=0, atol=1e-6)  # shares tensors, and has no adapter


@pytest.mark.parametrize("dora", [False, True])
def test_computes_and_learns_as_pefts_own_model(dora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora)
    whole, other = model(), model()
    torch.manual_seed(5)
    theirs = get_peft_model(whole, config)
    torch.manual_seed(5)
    ours = attach(other, LowRank("dora" if dora else "lora", 4, 8))
    for one in (theirs, ours):
        trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            one(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(logits(ours), logits(theirs))
    assert base_names(ours) == {name.removeprefix("base_model.model.") for name, parameter in theirs.named_parameters()
                                if not parameter.requires_grad}


@torch.no_grad()
def test_packed_numbers_are_those_of_bitsandbytes():
    from bitsandbytes import functional

    layer = torch.nn.Linear(64, 32)
    four, state = functional.quantize_4bit(layer.weight.contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(PackedLinear(layer, "nf4").weight, functional.dequantize_4bit(four, state))
    half = torch.nn.Linear(64, 32)
    half.weight.copy_(layer.weight.half().float())
    eight, largest, _ = functional.int8_vectorwise_quant(half.weight.half())
    ours = PackedLinear(half, "int8")
    assert (ours.numbers - eight).abs().max() <= 1 and torch.allclose(ours.scales, largest.flatten().float())
    torch.testing.assert_close(ours.weight, half.weight, rtol=0, atol=float(largest.max()) / 127 / 2 + 1e-6)


QUANTIZERS = {
    "fp8": WeightQuantizer(kind="fp8"), "ternary": WeightQuantizer(kind="ternary"),
    "binary": WeightQuantizer(kind="binary"), "int2": WeightQuantizer(2, 17, rule="mse"),
    "int3": WeightQuantizer(3, symmetric=False), "int4": WeightQuantizer(4, 17, torch.bfloat16, symmetric=False),
    "int8": WeightQuantizer(8, None, torch.float16, symmetric=False), "tensor": WeightQuantizer(8, per_tensor=True)}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_packed_numbers_are_those_of_quantization_after_training_and_come_back(kind):
    quantizer, layer, again = QUANTIZERS[kind], torch.nn.Linear(51, 7), torch.nn.Linear(51, 7)  # rows end within a byte
    usual = torch.nn.Sequential(torch.nn.Linear(51, 7))
    usual[0].load_state_dict(layer.state_dict())
    quantize(usual, None, quantizer)
    held = PackedLinear(layer, *packed_numbers(quantizer, layer.weight))
    hold_numbers(again, quantizer, *held.stored)
    width = {"int2": 2, "ternary": 2, "binary": 2, "int3": 4, "int4": 4}.get(kind, 8)
    assert held.numbers.nbytes == 7 * -(-51 * width // 8)
    assert torch.equal(held.weight, usual[0].effective_weight) and torch.equal(held.weight, again.effective_weight)
    assert torch.equal(again.numbers().float(), usual[0].numbers().float())
    for one, other in zip(again.grid(), usual[0].grid(), strict=True):
        assert (one is None and other is None) or (torch.equal(one, other) and one.dtype is other.dtype)


def packed_layer(kind):
    layer, quantizer = torch.nn.Linear(64, 32), WeightQuantizer(4, 16, symmetric=False)
    return PackedLinear(layer, *(packed_numbers(quantizer, layer.weight) if kind == "int4" else (kind,)))


@pytest.mark.parametrize("kind", ["int8", "nf4", "int4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_products_are_dense_ones_and_save_no_dense_weight(kind, autocast):
    layer = packed_layer(kind)
    x, saved = torch.randn(3, 5, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one), \
            torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert out.dtype is (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-2 if autocast else 1e-6)
    mine = torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.float().square().sum(), x)[0]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.1 if autocast else 1e-5)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        saved.clear()
        layer(x)
    assert {tuple(one.shape) for one in saved} == {tuple(one.shape) for one in layer.stored}


def given(one, dtype=torch.float32):
    """Layers of the MLPs in two bits, whether they are adapted or not."""
    quantizer = WeightQuantizer(2, 16, dtype, rule="mse")
    return GivenNumbers({name: lambda weight: packed_numbers(quantizer, weight) for name, _ in one.named_modules()
                         if name.endswith(("up_proj", "down_proj"))}, dtype)


def test_bytes_of_a_base_are_known_from_shapes():
    for base in ("float32", "bfloat16", "int8", "nf4", "quantized"):
        asked = LowRank("dora", 4, 8, base=base)
        real = attach(model(), asked, given(model()) if base == "quantized" else None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = attach(model(), asked, given(model()) if base == "quantized" else None)
        assert parameter_bytes(real) == parameter_bytes(fake)
        assert real.lm_head.weight is real.model.embed_tokens.weight  # tied still
        assert {parameter.dtype for parameter in real.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_quantized_base_has_the_numbers_of_its_file_everywhere(dtype):
    whole = model()
    whole.model.norm.weight += 1e-3  # which neither half precision has
    before = whole.model.norm.weight.clone()
    held = base_of(attach(whole, LowRank(targets=("q_proj", "up_proj"), base="quantized"), given(whole, dtype)))
    packed = held.model.layers[0].mlp.down_proj  # has no adapter
    assert isinstance(packed, PackedLinear) and packed.numbers.nbytes == packed.weight.numel() // 4
    for name, tensor in held.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)), name
    assert torch.equal(held.model.norm.weight, before) is (dtype is torch.float32)
    assert held.lm_head.weight.dtype is (torch.float16 if dtype is torch.float16 else torch.bfloat16)


def test_another_base_has_another_digest():
    one, other = (attach(model(), LowRank(base="nf4")) for _ in range(2))
    assert base_digest(one) == base_digest(moved(other))  # the adapters do not count
    other.model.norm.weight.data[3] += 1e-6
    assert base_digest(one) != base_digest(other) and base_digest(model()) is None


@pytest.mark.parametrize("architecture, target, said", [
    ("llama", "q_prj", "no layer is called 'q_prj'; near to it: q_proj"),
    ("llama", "lm_head", "'lm_head' is the output head, which has no adapter"),
    ("llama", "embed_tokens", "'embed_tokens' is no linear layer"),
    ("mixtral", "down_proj", "'down_proj' is one tensor of all experts of a block"),
    ("mixtral", "experts", "'experts' is one tensor of all experts of a block"),
])
def test_targets_that_can_have_no_adapter(architecture, target, said):
    with pytest.raises(ValueError, match=said):
        target_names(model(architecture), [target])


def test_targets_are_whole_names_or_the_end_of_them():
    one = model()
    assert target_names(one, ["q_proj", "layers.0.mlp.up_proj"]) == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert len(target_names(one, None)) == 14


def test_products_need_no_context_where_nothing_is_learned():
    layer = PackedLinear(torch.nn.Linear(8, 4), "int8")
    out = product(torch.ones(2, 8), None, "int8", (4, 8), layer.numbers, layer.scales)
    assert not out.requires_grad and torch.allclose(out, layer.weight.sum(1).expand(2, 4), atol=1e-6)

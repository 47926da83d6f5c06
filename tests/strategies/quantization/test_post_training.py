"""Models quantized block after block: what is calibrated, with what memory, how well, and what the files say of it."""

import copy
from contextlib import closing

import pytest
import torch
from torch import nn

from strategies.common.blockwise_calibration import BlockwiseCalibrator, collect
from strategies.export.hf.transformers_folder import write_folder
from strategies.memory.tracker import LiveBytes
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.gptq import factorize, round_weights
from strategies.quantization.outliers import OutlierLinear
from strategies.quantization.post_training import quantize
from strategies.quantization.qat import Quantized, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer
from tests.strategies.export.hf.test_transformers_folder import Tokenizer, reloaded
from tests.strategies.quantization.calibrating import build, divergence, logits, plant_outliers, rows, trained

STATIC = ActivationQuantizer(dynamic=False)


def padded(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches whose second row ends early."""
    batches = rows(count, packed=False)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 15:] = 0
    return batches


@torch.no_grad()
def entering(model: nn.Module, layer: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """(tokens, inputs) of what enters a layer in the model's own forward, in float64."""
    found = []
    with layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2).double())):
        for batch in batches:
            model(**batch)
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool() for batch in batches]
    return torch.cat([values[mask] if len(values) == len(mask) else values  # a pooler gets one token of a row
                      for values, mask in zip(found, masks, strict=True)])


# ---- calibration

@pytest.mark.parametrize(("kind", "batches"), [("llama", rows()), ("llama", padded()), ("gemma3_text", rows()),
                                               ("gpt_neox", rows()), ("bert", padded()), ("bloom", padded())])
def test_every_layer_is_seen_as_in_the_models_own_forward(kind, batches):
    """Packed and padded rows, layers with and without windows, encoders; blocks are given what they always are."""
    model = build(kind)
    layers, found, walk = {}, {}, BlockwiseCalibrator(model, batches)
    with closing(walk.parts()) as parts:
        for modules in parts:
            mine = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
            layers |= mine
            found |= collect(walk, mine, moments=True)
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        values = entering(model, layer, batches)
        assert torch.allclose(found[name].largest.double(), values.abs().amax(0), rtol=1e-4, atol=1e-6), name
        wanted = values.T @ values
        assert (found[name].moment - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


def test_layers_that_read_the_same_share_what_was_seen():
    walk = BlockwiseCalibrator(build(), rows())
    with closing(walk.parts()) as parts:
        next(parts)
        found = collect(walk, {name: module for name, module in next(parts).items() if isinstance(module, nn.Linear)})
    shared = {}
    for name, seen in found.items():
        shared.setdefault(id(seen), []).append(name.rpartition(".")[2])
    assert list(shared.values()) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                                     ["down_proj"]]


def peak(blocks: int, batches: list[dict[str, torch.Tensor]], **how) -> tuple[int, int]:
    """Most bytes above those of the model and its rows while it is quantized, and bytes that stay: the grids."""
    model = build(num_hidden_layers=blocks, hidden_size=32)
    with LiveBytes() as tracker:
        tracker.watch(model, batches)
        before = tracker.current
        quantize(model, batches, WeightQuantizer(4, 32), **how)
        return tracker.peak - before, tracker.current - before


@pytest.mark.parametrize("how", [{"method": "gptq"}, {"activations": STATIC, "activation_range": "mse"},
                                 {"activations": STATIC, "smooth": 0.5, "outliers": 6.0}])
def test_memory_is_that_of_one_block_and_one_set_of_hidden_states(how):
    """Counted: more blocks add their grids, and more rows add their inputs of one block."""
    (few, kept), (many, more) = peak(1, rows(4), **how), peak(4, rows(4), **how)
    assert many - few <= more - kept and more < 12_000
    twice, _ = peak(1, rows(8), **how)
    assert 0 <= twice - few - 4 * 2 * 24 * 32 * 4 <= 500, "batches, rows, tokens, width, bytes"


def test_the_model_is_left_in_its_mode_and_without_hooks():
    model = build().train()
    model.model.layers[1].eval()
    with pytest.raises(ValueError, match="not finite"):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
            model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
        quantize(model, rows(), WeightQuantizer(8), method="gptq")
    assert model.training and not model.model.layers[1].training and model.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                   for module in model.modules())


# ---- rounding

@pytest.mark.parametrize("act_order", [True, False])
def test_blocks_are_calibrated_on_what_the_quantized_blocks_before_them_give(act_order):
    model, batches, quantizer = build(), rows(), WeightQuantizer(3, 32)
    before = copy.deepcopy(model)
    names = quantize(model, batches, quantizer, method="gptq", act_order=act_order)
    assert names == [name for name, _ in quantized_layers(model)] and len(names) == 21
    for number in range(3):
        layer = model.model.layers[number].self_attn.k_proj
        values = entering(model, layer, batches)
        exact = before.model.layers[number].self_attn.k_proj.weight
        wanted, grid = round_weights(exact, quantizer, factorize(values.T @ values, 0.01, act_order))
        assert torch.isclose(layer.weight, wanted, atol=1e-6).float().mean() > 0.99
        assert torch.equal(layer.grid().scale, grid.scale) and torch.equal(layer.effective_weight, layer.weight)


def test_a_trained_model_is_nearer_to_itself_under_gptq():
    whole, batches, held_out = trained()
    for bits, share in ((3, 0.6), (4, 0.6)):
        found = {}
        for method in ("rtn", "gptq"):
            model = copy.deepcopy(whole)
            quantize(model, batches, WeightQuantizer(bits, 32), method=method)
            found[method] = divergence(model, whole, held_out)
        assert 0 < found["gptq"] < share * found["rtn"], (bits, found)


@pytest.mark.parametrize(("quantizer", "how"), [
    (WeightQuantizer(8), {}), (WeightQuantizer(2, 32, symmetric=False, rule="mse"), {}),
    (WeightQuantizer(kind="ternary"), {}), (WeightQuantizer(4, per_tensor=True), {}),
    (WeightQuantizer(4, 32), {"embeddings": True, "ignore": ()}),
    (WeightQuantizer(4), {"rules": [("*.1.*", None), ("*.down_proj", WeightQuantizer(kind="fp8"))]})])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_compute_with_the_numbers_that_are_exported(quantizer, how, method):
    model, before = build(), build().state_dict()
    names = quantize(model, rows(), quantizer, method=method, **how)
    for name, layer in quantized_layers(model):
        exported = layer.quantizer.dequantize(layer.numbers(), layer.grid(), torch.float32)
        assert torch.equal(layer.effective_weight, exported)
        rounded = method == "gptq" and "embed" not in name and "lm_head" not in name
        assert torch.equal(layer.weight, exported if rounded else before[f"{name}.weight"])
    assert ("lm_head" in names) == ("model.embed_tokens" in names) == ("embeddings" in how)
    if "lm_head" in names:
        assert model.lm_head.scale is model.model.embed_tokens.scale
    assert any(".1." in name for name in names) != ("rules" in how)


def test_encoders_and_heads_are_quantized_too():
    encoder, model = build("bert"), build(tie_word_embeddings=False)
    whole, batches = copy.deepcopy(encoder), padded()
    found = {}
    for method in ("rtn", "gptq"):
        encoder = copy.deepcopy(whole)
        assert "pooler.dense" in quantize(encoder, batches, WeightQuantizer(3), method=method)
        found[method] = sum(float((encoder(**batch).last_hidden_state - whole(**batch).last_hidden_state)[
            batch["attention_mask"].bool()].square().sum().detach()) for batch in batches)
    assert found["gptq"] < 0.7 * found["rtn"]
    exact = model.lm_head.weight.detach().clone()
    told = []
    assert "lm_head" in quantize(model, rows(), WeightQuantizer(3), method="gptq", ignore=(), tell=told.append)
    values = entering(model, model.lm_head, rows())
    wanted, _ = round_weights(exact, WeightQuantizer(3), factorize(values.T @ values))
    assert torch.isclose(model.lm_head.weight, wanted, atol=1e-6).float().mean() > 0.99
    assert sorted(told) == sorted(name for name, _ in quantized_layers(model))


def test_rounding_to_nearest_needs_no_rows_and_no_blocks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    assert quantize(model, None, WeightQuantizer(8), activations=ActivationQuantizer()) == ["0", "2"]
    assert model[0].grid().scale.shape == (4, 1) and model(torch.randn(1, 3, 4, 4)).shape == (1, 4)


# ---- activations

@pytest.mark.parametrize("kind", ["int", "fp8"])
def test_static_scales_are_those_of_all_rows_together(kind):
    for way in ("minmax", "mse"):
        model, batches, activations = build(), rows(), ActivationQuantizer(kind, dynamic=False)
        whole = copy.deepcopy(model)
        quantize(model, batches, WeightQuantizer(8), activations=activations, activation_range=way)
        layer = model.model.layers[0].mlp.down_proj
        values = entering(whole, whole.model.layers[0].mlp.down_proj, batches).float()
        covering = activations.scale(values.abs().amax())
        assert layer.input_scale.shape == (1,) and not layer.input_scale.requires_grad
        if way == "minmax":
            assert torch.allclose(layer.input_scale, covering, rtol=1e-4)
            continue
        best, ours = (min(float((activations.fake_quantize(values, scale) - values).square().sum()) for scale in scales)
                      for scales in (covering * torch.linspace(0.05, 1.1, 400), [layer.input_scale]))
        assert ours <= 1.03 * best


def test_static_scales_and_smoothed_and_rounded_models_reload_with_no_difference(tmp_path):
    hows = {"static": {"activations": STATIC}, "mse": {"activations": STATIC, "activation_range": "mse"},
            "fp8": {"quantizer": WeightQuantizer(kind="fp8"), "activations": ActivationQuantizer("fp8", dynamic=False)},
            "smooth": {"activations": STATIC, "smooth": 0.5, "method": "gptq"},
            "gptq": {"quantizer": WeightQuantizer(3, 32, symmetric=False), "method": "gptq"},
            "ternary": {"quantizer": WeightQuantizer(kind="ternary"), "method": "gptq"}}
    models = {}
    for name, how in hows.items():
        models[name] = plant_outliers(build())
        quantize(models[name], rows(), **{"quantizer": WeightQuantizer(8), **how})
        write_folder(tmp_path / name, models[name], Tokenizer(), torch.float32)
    ids, found = reloaded([tmp_path / name for name in hows], tmp_path)
    for name, model in models.items():
        with torch.no_grad():
            assert torch.equal(model(ids).logits, found[name]), name


# ---- outliers

@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_with_whole_columns_is_the_sum_of_two_products(symmetric):
    model, batches = plant_outliers(build()), rows()
    whole = copy.deepcopy(model)
    quantize(model, batches, WeightQuantizer(4, 32, symmetric=symmetric), activations=STATIC, outliers=20.0)
    layer, exact = model.model.layers[0].mlp.up_proj, whole.model.layers[0].mlp.up_proj.weight.double()
    assert type(layer) is OutlierLinear and set(layer.outliers.tolist()) == {5, 40}
    zeros = layer.numbers() if symmetric else layer.numbers() - layer.grid().zero_point.repeat_interleave(32, 1)
    assert not zeros[:, layer.outliers].any() and torch.equal(layer.whole.double(), exact[:, layer.outliers])
    values = torch.randn(7, 64, dtype=torch.float64)
    values[:, layer.outliers] *= 60
    rest = values.clone()
    rest[:, layer.outliers] = 0
    assert rest.abs().max() < 127 * layer.input_scale
    weight = exact.clone()
    weight[:, layer.outliers] = 0
    near = layer.quantizer.fake_quantize(weight.float()).double()
    rounded = (rest / layer.input_scale).round() * layer.input_scale
    wanted = rounded @ near.T + values[:, layer.outliers] @ exact[:, layer.outliers].T
    assert torch.allclose(layer(values.float()).double(), wanted, atol=1e-3, rtol=1e-3)
    assert torch.allclose(layer.effective_weight.double(), near + (exact - weight))


def test_whole_columns_keep_activations_with_outliers_near():
    whole, other, found = plant_outliers(build()), rows(2, seed=9), {}
    for threshold in (None, 20.0):
        for method in ("rtn", "gptq"):
            model = plant_outliers(build())
            quantize(model, rows(), WeightQuantizer(4, 32), activations=ActivationQuantizer(), outliers=threshold,
                     method=method)
            found[threshold, method] = sum(float((logits(model, batch) - logits(whole, batch)).square().mean())
                                           for batch in other)
    assert found[20.0, "rtn"] < 0.5 * found[None, "rtn"] and found[20.0, "gptq"] < 0.5 * found[None, "gptq"]
    assert found[20.0, "gptq"] < found[20.0, "rtn"]


def test_a_folder_does_not_take_whole_columns(tmp_path):
    model = plant_outliers(build())
    quantize(model, rows(), WeightQuantizer(8), outliers=20.0)
    assert sum(isinstance(module, OutlierLinear) for module in model.modules()) == 15
    with pytest.raises(ValueError, match="OutlierLinear"):
        write_folder(tmp_path / "student", model, Tokenizer())


# ---- mistakes

@pytest.mark.parametrize(("how", "batches", "message"), [
    ({"method": "gptq"}, None, "method 'gptq' cannot do without calibration rows"),
    ({"activations": STATIC, "smooth": 0.5}, [], "activations that are not dynamic and smooth cannot do without"),
    ({"method": "gptq"}, rows(1), "have 48 tokens, and model.layers.0.self_attn.q_proj has 64 inputs: its second "
     "moment can have full rank from 64 tokens on"),
    ({"method": "awq"}, rows(), "method is rtn or gptq, not 'awq'"),
    ({"activation_range": "kl"}, rows(), "activation_range is minmax or mse, not 'kl'"),
    ({"ignore": ("attention.*",)}, rows(), "matches no layer"),
    ({"method": "gptq", "damping": 0.0}, rows(), "a damping of 0.0 cannot hold"),
    ({"smooth": 2.0}, rows(), "0 to 1, not 2.0"),
])
def test_mistakes_are_said_and_leave_the_model_alone(how, batches, message):
    model = build(intermediate_size=64)
    with pytest.raises(ValueError, match=message):
        quantize(model, batches, WeightQuantizer(4, 32), **how)
    assert not any(isinstance(module, Quantized) for module in model.modules())


def test_what_is_found_on_the_way_names_the_layer():
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: what enters each of its 64 columns is above 0.01"):
        quantize(build(), rows(), WeightQuantizer(8), outliers=0.01)
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 1e30
        model.model.layers[1].mlp.gate_proj.weight[3] = 1e30
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: what enters it on the calibration rows is not"):
        quantize(model, rows(), WeightQuantizer(8), activations=STATIC)
    with pytest.raises(ValueError, match="cannot find the blocks of Sequential"):
        quantize(nn.Sequential(nn.Linear(4, 4)), rows(), WeightQuantizer(8), method="gptq")


def test_whole_columns_are_baked_into_a_plain_layer_unless_the_others_are_rounded():
    model, batches = plant_outliers(build()), rows()
    quantize(model, batches, WeightQuantizer(8), outliers=20.0)
    before = logits(model, batches[0])
    assert torch.allclose(logits(freeze_quantized(model, torch.float32), batches[0]), before, atol=1e-4)
    assert not any(isinstance(layer, OutlierLinear) for layer in model.modules())
    model = plant_outliers(build())
    quantize(model, batches, WeightQuantizer(8), outliers=20.0, activations=ActivationQuantizer())
    with pytest.raises(ValueError, match="has columns of full precision beside rounded ones"):
        freeze_quantized(model, torch.float32)

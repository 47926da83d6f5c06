"""Outliers of activations moved into weights: the model stays what it was, and its activations become easier."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.post_training import quantize
from strategies.quantization.quantizer import WeightQuantizer
from strategies.quantization.smoothing import factors, smooth
from tests.strategies.quantization.calibrating import build, logits, plant_outliers, rows


def test_factors_are_those_of_the_paper():
    inputs, first, second = torch.rand(6) * 50, torch.randn(4, 6), torch.randn(3, 6)
    inputs[2], first[:, 4], second[:, 4] = 0, 0, 0
    for alpha in (0.0, 0.5, 0.8, 1.0):
        largest = torch.maximum(first.abs().amax(0), second.abs().amax(0)).double()
        wanted = inputs.double() ** alpha / largest ** (1 - alpha)
        wanted[[2, 4]] = 1
        assert torch.allclose(factors(inputs, [first, second], alpha).double(), wanted, rtol=1e-5)


@pytest.mark.parametrize(("kind", "norms"), [
    ("llama", 6), ("gpt_neox", 6), ("gemma2", 6), ("gemma3_text", 6), ("phi", 3), ("qwen3_moe", 3)])
def test_the_model_computes_what_it_did(kind, norms):
    """RMSNorm, LayerNorm with bias, 1 + weight, several layers of windows, one norm for all layers, experts."""
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if kind == "qwen3_moe" else {}
    model, batches, other = build(kind, **changes), rows(), rows(1, seed=9)[0]
    before, weights = logits(model, other), copy.deepcopy(model.state_dict())
    assert len(smooth(model, batches, 0.6)) == norms
    assert (logits(model, other) - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])]
    assert len(changed) >= 3 * norms and not any("embed" in name or "down_proj" in name for name in changed)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_in_16_bits_the_model_moves_by_their_rounding(kind):
    """A multiplier 1 + weight that is divided by 50 would be off by a tenth."""
    model, other = build(kind, head_dim=32).to(torch.bfloat16), rows(1, seed=9)[0]
    exact = copy.deepcopy(model).float()
    before = (logits(model, other) - logits(exact, other)).square().mean()
    smooth(model, rows(), 0.5)
    assert (logits(model, other) - logits(exact, other)).square().mean() < 2 * before


def test_what_enters_the_layers_is_divided_by_the_factors():
    model, batches = plant_outliers(build()), rows()
    layer, enters = model.model.layers[0], []

    def sizes():
        enters.clear()
        with layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: enters.append(args[0].abs().amax((0, 1)))):
            for batch in batches:
                logits(model, batch)
        return torch.stack(enters).amax(0)

    before = sizes()
    factor = factors(before, [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight], 0.5)
    smooth(model, batches, 0.5)
    assert torch.allclose(sizes(), before / factor, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_activations_with_outliers_are_quantized_better(dynamic):
    other, found = rows(2, seed=9), {}
    whole = plant_outliers(build())
    for alpha in (None, 0.5):
        model = plant_outliers(build())
        quantize(model, rows(), WeightQuantizer(8), activations=ActivationQuantizer(dynamic=dynamic), smooth=alpha)
        found[alpha] = sum(float((logits(model, batch) - logits(whole, batch)).square().mean()) for batch in other)
    assert found[0.5] < 0.2 * found[None]


class Scaled(nn.Module):
    """A norm that multiplies by the exponential of its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, values):
        return nn.functional.rms_norm(values, (8,)) * self.weight.exp()


class Block(nn.Module):
    """Two linear layers behind a norm, whose output is added to what comes out, or enters a third by another way."""

    def __init__(self, norm: nn.Module, add: bool = False, view: bool = False):
        super().__init__()
        self.norm, self.add, self.view = norm, add, view
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        values = self.norm(hidden)
        middle = self.up(values) * self.gate(values.flatten(0, 1)).view(*values.shape[:2], 16).sigmoid() if self.view \
            else self.up(values) * self.gate(values).sigmoid()
        return self.down(middle) + (values if self.add else hidden)


class Model(nn.Module):
    def __init__(self, *blocks: Block):
        super().__init__()
        self.config, self.blocks = SimpleNamespace(num_hidden_layers=len(blocks)), nn.ModuleList(blocks)
        self.embed, self.head = nn.Embedding(90, 8), nn.Linear(8, 90)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def test_norms_that_something_else_reads_stay_as_they_were():
    """A sum with the norm, as in BERT, and a layer that gets the values in another shape, as a router does."""
    torch.manual_seed(0)
    model = Model(Block(nn.LayerNorm(8)), Block(nn.LayerNorm(8), add=True), Block(nn.LayerNorm(8), view=True))
    nn.init.normal_(model.blocks[0].norm.bias)
    before, whole = copy.deepcopy(model.state_dict()), logits(model, *rows(1, packed=False))
    with pytest.warns(UserWarning) as warned:
        assert smooth(model, rows(packed=False)) == ["blocks.0.norm"]
    assert [str(one.message) for one in warned] == [
        "blocks.1.norm is not smoothed: not only blocks.1.up, blocks.1.gate read it",
        "blocks.2.norm is not smoothed: not only blocks.2.up read it"]
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.up.weight", "blocks.0.gate.weight"}
    assert torch.allclose(logits(model, *rows(1, packed=False)), whole, atol=1e-5)


def test_a_layer_that_stays_whole_is_scaled_with_those_that_do_not():
    model, other = plant_outliers(build()), rows(1, seed=9)[0]
    before = logits(model, other)
    layers = [f"model.layers.{number}.self_attn.q_proj" for number in range(3)]
    assert smooth(model, rows(), layers=layers) == [f"model.layers.{number}.input_layernorm" for number in range(3)]
    assert torch.allclose(logits(model, other), before, atol=1e-5)


def test_weights_that_are_shared_are_not_scaled():
    model = Model(Block(nn.LayerNorm(8)), Block(nn.LayerNorm(8)))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="Model has no norm that linear layers"):
        smooth(model, rows(packed=False))


def test_what_cannot_be_smoothed_is_said():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="BertModel has no norm that linear layers"):
        smooth(build("bert"), rows(packed=False))
    model = Model(Block(Scaled()), Block(Scaled()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="blocks.0.norm cannot be smoothed: this Scaled multiplies neither"):
        smooth(model, rows(packed=False))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="0 to 1, not 1.5"):
        smooth(build(), rows(), 1.5)

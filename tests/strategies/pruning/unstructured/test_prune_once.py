"""Models pruned once: what is zero, what an output loses, and what is left alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from strategies.pruning.unstructured.layer_inputs import output_error
from strategies.pruning.unstructured.prune_once import one_shot
from tests.strategies.quantization.calibrating import build, divergence, logits, rows, trained

MOE = {"kind": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
       "decoder_sparse_step": 1}


def zeros(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(name) == 0


def captured(model: nn.Module, batches: list, name: str) -> torch.Tensor:
    """(tokens, inputs) of a layer, by a plain hook."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: found.append(args[0].flatten(0, -2).detach()))
    for batch in batches:
        logits(model, batch)
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_every_layer_has_the_zeros_and_the_record_its_own_errors(method, asked):
    model, batches = build(), rows()
    before = copy.deepcopy(model)
    done = one_shot(model, batches, method=method, **asked)
    assert done["method"] == method and len(done["layers"]) == 3 * 7
    assert done["sparsity"] == pytest.approx(0.5, abs=2e-3)
    for name, layer in done["layers"].items():
        weight = model.get_submodule(name).weight
        assert layer["sparsity"] == float((weight == 0).double().mean()) == pytest.approx(0.5, abs=4e-3)
        if "pattern" in asked:
            assert ((weight == 0).view(len(weight), -1, 4).sum(-1) == 2).all()
        if name.endswith(("q_proj", "down_proj")):
            x = captured(model, batches, name)  # of a block, q_proj's inputs are those of earlier blocks as pruned
            if name.endswith("down_proj"):
                continue  # whose inputs changed with the block's own gate_proj
            expected = output_error(weight, before.get_submodule(name).weight, x.T @ x)
            assert layer["error"] == pytest.approx(expected, rel=2e-3)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_wanda_is_the_papers_score_in_each_row():
    model, batches = build(num_hidden_layers=1), rows()
    before = copy.deepcopy(model)
    one_shot(model, batches, method="wanda", sparsity=0.25)
    name = "model.layers.0.self_attn.q_proj"
    x, exact = captured(before, batches, name).double(), before.get_submodule(name).weight.double()
    score = exact.abs() * x.norm(dim=0)
    expected = torch.stack([torch.where(row >= row.sort().values[16], 1.0, 0.0) for row in score]) * exact
    assert torch.equal(model.get_submodule(name).weight.double(), expected)


def test_a_trained_model_loses_least_by_sparsegpt():
    model, calibration, held_out = trained(steps=80)
    lost = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = copy.deepcopy(model)
        done = one_shot(pruned, calibration, method=method, sparsity=0.6)
        lost[method] = divergence(pruned, model, held_out), sum(one["error"] for one in done["layers"].values())
    for kind in range(2):
        assert 0 < lost["sparsegpt"][kind] < 0.5 * min(lost["wanda"][kind], lost["magnitude"][kind]), lost


def test_padding_does_not_count():
    batch = rows(1, packed=False)[0]
    padded = {"input_ids": torch.cat([batch["input_ids"], torch.full((2, 40), 7)], 1),
              "attention_mask": torch.cat([torch.ones(2, 24), torch.zeros(2, 40)], 1).long()}
    one, other = build(), build()
    one_shot(one, [batch], method="wanda", sparsity=0.5)
    one_shot(other, [padded], method="wanda", sparsity=0.5)
    same = [float((zeros(one, name) == zeros(other, name)).float().mean()) for name in one_shot(
        build(), None, method="magnitude", sparsity=0.5)["layers"] for name in [f"{name}.weight"]]
    assert min(same) > 0.99, "but for rounding"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_gpt2_stores_its_weights_the_other_way(method):
    model = build("gpt2", hidden_size=32, num_hidden_layers=2)
    done = one_shot(model, rows(), method=method, pattern="2:4")
    weight = model.transformer.h[1].mlp.c_fc.weight  # (inputs, outputs)
    assert len(done["layers"]) == 2 * 4
    assert ((weight == 0).view(8, 4, -1).sum(1) == 2).all()


def test_experts_are_pruned_by_magnitude_and_the_rest_as_asked():
    model = build(**MOE)
    done = one_shot(model, rows(), method="sparsegpt", pattern="2:4")
    assert len(done["layers"]) == 3 * 6
    methods = {name.split("layers.")[1][2:]: one["method"] for name, one in done["layers"].items()}
    assert methods["self_attn.q_proj"] == "sparsegpt" and methods["mlp.experts.down_proj"] == "magnitude"
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert ((weight == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_convolutions_are_pruned_by_magnitude_alone():
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                      layer_type="basic", num_labels=3))
    rows = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    with pytest.raises(ValueError, match="cannot find the blocks of ResNet.*take method 'magnitude'"):
        one_shot(model, rows, method="wanda", sparsity=0.5)
    done = one_shot(model, rows, method="magnitude", sparsity=0.5, ignore=("*embedder*",))
    assert all(one["error"] is None and one["sparsity"] == pytest.approx(0.5, abs=0.02)
               for one in done["layers"].values())
    assert not (model.resnet.embedder.embedder.convolution.weight == 0).any()


def test_a_tied_head_is_left_alone_and_an_own_head_by_its_pattern():
    tied, own = build(), build(tie_word_embeddings=False)
    assert "lm_head" not in one_shot(tied, None, method="magnitude", sparsity=0.5, ignore=())["layers"]
    assert "lm_head" in one_shot(own, None, method="magnitude", sparsity=0.5, ignore=())["layers"]
    assert "lm_head" not in one_shot(build(tie_word_embeddings=False), None, method="magnitude", sparsity=0.5)["layers"]


@pytest.mark.parametrize(("asked", "message"), [
    ({"method": "best", "sparsity": 0.5}, "method is magnitude, wanda, sparsegpt"),
    ({"method": "wanda", "sparsity": 0.5, "batches": None}, "cannot do without calibration rows"),
    ({"method": "sparsegpt", "sparsity": 0.5, "batches": "few"}, "the calibration rows have 48 tokens"),
    ({"method": "wanda", "pattern": "2:5"}, "which do not divide into groups of 5"),
    ({"method": "wanda", "sparsity": 0.5, "ignore": ("q",)}, "matches no layer; names look like"),
    ({"method": "wanda", "sparsity": 0.5, "ignore": ("*",)}, "no layer to prune outside of"),
    ({"method": "sparsegpt", "sparsity": 0.5, "damping": 0.0}, "take 0.01, or more"),
], ids=str)
def test_what_cannot_be_done_is_refused_and_the_model_left_as_it_is(asked, message):
    model = build()
    before = copy.deepcopy(model.state_dict())
    batches = {None: None, "few": rows(1)}.get(asked.pop("batches", "enough"), rows())
    with pytest.raises(ValueError, match=message):
        one_shot(model, batches, **asked)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

"""Zeros that stay, and schedules that make more, with every optimizer."""

import copy

import pytest
import torch

from strategies.optimizers.by_name import build as optimizer_of
from strategies.pruning.unstructured.gradual import CubicSchedule, GradualPruning
from strategies.pruning.unstructured.prunable_layers import prunable, weight_names
from strategies.pruning.unstructured.prune_once import one_shot
from strategies.pruning.unstructured.sparse_weights import SparseWeights
from strategies.pruning.unstructured.sparsity_pattern import Pattern
from strategies.quantization.gptq import factorize, round_weights
from strategies.quantization.post_training import quantize
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer
from strategies.sharding.engine import Engine
from tests.strategies.quantization.calibrating import build, rows

OPTIMIZERS = ["adamw", "muon", "lamb", "adafactor", "adamw8bit"]


def trained(model: torch.nn.Module, name: str, sparse: SparseWeights | None, steps: int = 4) -> Engine:
    """An engine that has taken steps on a model, clipping its gradients."""
    engine = Engine(model, model, optimizer_of(model, name, lr=1e-2, betas=(0.9, 0.95), eps=None, weight_decay=0.1))
    engine.sparse = sparse
    for step in range(steps):
        if sparse is not None:
            sparse.prune(step)
        ids = rows(1, seed=step)[0]["input_ids"]
        engine.backward(model(input_ids=ids, labels=ids).loss)
        assert engine.update(1.0, True).taken
    return engine


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_to_the_bit_and_the_others_are_trained(name):
    model = build(num_hidden_layers=1)
    one_shot(model, None, method="magnitude", pattern="2:4")
    before = copy.deepcopy(model.state_dict())
    names = weight_names(model, prunable(model))
    trained(model, name, SparseWeights(model, names))
    for weight_name in names:
        now, then = model.get_parameter(weight_name), before[weight_name]
        assert torch.equal(now == 0, then == 0)
        assert ((now != then) == (then != 0)).float().mean() > 0.99


def test_without_masks_muon_fills_the_zeros():
    model = build(num_hidden_layers=1)
    one_shot(model, None, method="magnitude", pattern="2:4")
    trained(model, "muon", None)
    assert not (model.model.layers[0].mlp.up_proj.weight == 0).any(), "so the test above would see it"


def test_the_norm_that_clipping_sees_is_without_the_zeros():
    model = build(num_hidden_layers=1)
    one_shot(model, None, method="magnitude", sparsity=0.9)
    ids = rows(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    chosen = {id(layer.weight) for layer in prunable(model).values()}
    squares = sum(float((weight.grad * (weight != 0) if id(weight) in chosen else weight.grad).square().sum())
                  for weight in model.parameters())
    engine = Engine(model, model, torch.optim.SGD(model.parameters(), 0.1))
    engine.sparse = SparseWeights(model, weight_names(model, prunable(model)))
    assert engine.update(None, True).norm == pytest.approx(squares**0.5, rel=1e-5)


@pytest.mark.parametrize("scheme", [{"bits": 4}, {"bits": 3, "symmetric": False, "group_size": 16}, {"kind": "ternary"},
                                    {"kind": "fp8"}, {"bits": 4, "rule": "learned"}, {"bits": 2, "rule": "mse"}],
                         ids=str)
def test_zeros_are_zero_when_quantized_in_training_and_stay_so(scheme):
    model = build(num_hidden_layers=1)
    one_shot(model, None, method="magnitude", pattern="2:4")
    zeros = {name: layer.weight == 0 for name, layer in prunable(model).items()}
    prepare(model, WeightQuantizer(**scheme))
    trained(model, "adamw", SparseWeights(model, weight_names(model, prunable(model))))
    for name, layer in quantized_layers(model):
        assert not layer.effective_weight[zeros[name]].any() and not layer.weight[zeros[name]].any()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", [{"bits": 4}, {"bits": 3, "symmetric": False, "group_size": 16},
                                    {"kind": "ternary"}], ids=str)
def test_zeros_stay_when_quantized_after_training(method, scheme):
    model = build(num_hidden_layers=1)
    one_shot(model, rows(), method="sparsegpt", pattern="2:4")
    zeros = {name: layer.weight == 0 for name, layer in prunable(model).items()}
    quantize(model, rows(), WeightQuantizer(**scheme), method=method)
    for name, layer in quantized_layers(model):
        assert not layer.effective_weight[zeros[name]].any()


def test_gptq_makes_up_for_zeros_as_for_what_it_rounds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    exact = 0.1 * torch.randn(16, 48, generator=generator)
    exact[torch.rand(16, 48, generator=generator) < 0.5] = 0
    quantizer = WeightQuantizer(3)
    found, _ = round_weights(exact, quantizer, factorize(x.T @ x))
    nearest = quantizer.fake_quantize(exact)
    assert not found[exact == 0].any()
    assert (x @ (found - exact).T).square().sum() < 0.7 * (x @ (nearest - exact).T).square().sum()


def test_the_schedule_is_the_papers():
    schedule = CubicSchedule(begin=10, end=50, every=8, final=0.8)
    found = {step: schedule.at(step) for step in range(60) if schedule.at(step) is not None}
    assert list(found) == [10, 18, 26, 34, 42, 50]
    for step, share in found.items():
        assert share == pytest.approx(0.8 + (0 - 0.8) * (1 - (step - 10) / (5 * 8)) ** 3)
    assert [schedule.reached(step) for step in (0, 9, 19, 59)] == [0, 0, found[18], 0.8]
    assert [step for step in range(60) if CubicSchedule(10, 49, 8, 0.8).at(step) is not None][-1] == 49


@pytest.mark.parametrize("method", ["magnitude", "movement"])
@pytest.mark.parametrize(("pattern", "shares"), [(Pattern.parse(0.8), [0.0, 0.6, 0.8, 0.8]),
                                                 (Pattern.parse(pattern="1:8"), [0.0, 0.75, 0.875, 0.875])], ids=str)
def test_zeros_grow_in_number_and_never_come_back(method, pattern, shares):
    model = build(num_hidden_layers=1)
    final = pattern.sparsity
    sparse = GradualPruning(model, prunable(model), pattern, CubicSchedule(0, 4, 2, final), method)
    name, seen = "model.layers.0.mlp.up_proj.weight", [torch.zeros(1)]
    engine = Engine(model, model, optimizer_of(model, "adamw", lr=1e-2, betas=(0.9, 0.95), eps=None, weight_decay=0.1))
    engine.sparse = sparse
    for step in range(7):
        sparse.prune(step)
        ids = rows(1, seed=step)[0]["input_ids"]
        engine.backward(model(input_ids=ids, labels=ids).loss)
        engine.update(1.0, True)
        seen.append((model.get_parameter(name) == 0).float())
        assert (seen[-1] >= seen[-2]).all()
    found = [float(seen[step].mean()) for step in (1, 3, 5, 7)]
    expected = [0.0, final * (1 - 0.5**3), final, final] if pattern.of is None else shares
    assert found == pytest.approx(expected, abs=1e-3)


def test_movement_prunes_what_training_moves_towards_zero():
    weight = torch.nn.Parameter(torch.tensor([[3.0, -0.5, 2.0, 0.4]]))
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight = weight
    sparse = GradualPruning(model, {"": model}, Pattern.parse(0.5), CubicSchedule(1, 1, 1, 0.5), "movement")
    engine = Engine(model, model, torch.optim.SGD([weight], 0.1))
    engine.sparse = sparse
    gradient = torch.tensor([[1.0, 1.0, 1.0, -1.0]])  # the large ones shrink, and the small ones grow
    (weight * gradient).sum().backward()
    before = weight.detach().clone()
    engine.update(None, True)
    assert torch.equal(sparse.scores("weight"), -before * gradient)
    sparse.prune(1)
    assert (weight == 0).tolist() == [[True, False, True, False]]


def test_a_step_that_is_not_taken_leaves_the_scores():
    model = torch.nn.Linear(4, 4, bias=False)
    engine = Engine(model, model, torch.optim.SGD(model.parameters(), 0.1))
    engine.sparse = sparse = GradualPruning(model, {"": model}, Pattern.parse(0.5), CubicSchedule(5, 5, 1, 0.5),
                                            "movement")
    model(torch.full((1, 4), torch.inf)).sum().backward()
    assert not engine.update(1.0, True).taken and not sparse.scores("weight").any()


def test_a_layer_that_begins_at_zero_is_trained_before_it_is_pruned():
    model = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.zeros_(model.weight)
    sparse = GradualPruning(model, {"": model}, Pattern.parse(0.5), CubicSchedule(1, 1, 1, 0.5))
    engine = Engine(model, model, torch.optim.SGD(model.parameters(), 0.1))
    engine.sparse = sparse
    model(torch.randn(4, 8)).square().sum().sub(model(torch.randn(4, 8)).sum()).backward()
    engine.update(None, True)
    sparse.prune(1)
    assert float((model.weight == 0).float().mean()) == 0.5

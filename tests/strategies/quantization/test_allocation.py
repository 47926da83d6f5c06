"""Sensitivities against layers quantized by hand, allocations against brute force, bytes against the files."""

import copy
import itertools
import json
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from matplotlib import image
from torch import nn

from strategies.export.sizes import exported_bytes
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.allocation import Allocation, allocate, curve, draw_curve, rows, uniform
from strategies.quantization.qat import prepare, quantized_layers
from strategies.quantization.quantizer import RULES, WeightQuantizer
from strategies.quantization.sensitivity import Sensitivity, candidates, estimate, measure, stored_bytes
from tests.conftest import sentences


class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 16)
        self.up, self.down, self.lm_head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 12, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.lm_head(hidden + self.down(self.up(hidden).relu()))


IDS = torch.arange(24).view(4, 6) % 12


def divergence(full: torch.Tensor):
    def loss(model):
        return nn.functional.kl_div(model(IDS).double().log_softmax(-1), full.double().log_softmax(-1),
                                    log_target=True, reduction="batchmean").detach()
    return loss


def drawn(seed: int, layers: int, choices: int, size: int, spread: float = 3.0) -> Sensitivity:
    """Sensitivities of nothing: bytes up to `size`, that share no divisor, and rises over `spread` decades."""
    numbers = numpy.random.default_rng(seed)
    return Sensitivity(tuple((f"layer.{number}",) for number in range(layers)), candidates()[:choices],
                       10 ** numbers.uniform(-spread, 0, (layers, choices)),
                       numbers.integers(1, size, (layers, choices)))


def every(sensitivity: Sensitivity) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Bytes and rises of all allocations."""
    layers, columns = sensitivity.rises.shape
    all_of = numpy.array(list(itertools.product(range(columns), repeat=layers)))
    rises = numpy.array([math.fsum(sensitivity.rises[range(layers), chosen]) for chosen in all_of])
    return sensitivity.bytes[numpy.arange(layers), all_of].sum(1), rises


# ---- sensitivity

def test_measured_rises_are_those_of_layers_quantized_by_hand():
    model = Model().eval().double()
    loss = divergence(model(IDS).detach())
    found = measure(model, candidates(8), loss, ignore=())
    assert found.layers == (("up",), ("down",), ("lm_head",))
    for row, (name,) in enumerate(found.layers):
        for column, quantizer in enumerate(found.candidates):
            alone = copy.deepcopy(model)
            prepare(alone, quantizer, ignore=[other for other in ("up", "down", "lm_head") if other != name])
            assert found.rises[row, column] == pytest.approx(float(loss(alone)), rel=1e-4)
    assert (found.rises[:, 0] < found.rises[:, 3]).all(), "8 bits against 2"


def test_a_layer_in_full_precision_costs_no_loss():
    found = measure(Model(), [None, WeightQuantizer(2)], lambda model: float(model(IDS).square().mean()))
    assert (found.rises[:, 0] == 0).all() and found.bytes[:, 0].tolist() == [4 * 16 * 24] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_the_very_same_afterwards(fails):
    model = Model(tied=True)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    calls = iter(range(100))

    def loss(model):
        return math.nan if fails and next(calls) == 7 else float(model(IDS).square().mean())

    if fails:
        with pytest.raises(ValueError, match=r"up with WeightQuantizer\(bits=4.*: the loss is nan"):
            measure(model, candidates(), loss, ignore=(), embeddings=True)
    else:
        measure(model, candidates(), loss, ignore=(), embeddings=True)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]) and parameter.requires_grad
    assert model.lm_head.weight is model.embed.weight


def test_layers_that_share_a_weight_are_one():
    model = Model(tied=True).eval()
    loss = divergence(model(IDS).detach())
    found = measure(model, candidates(8), loss, ignore=(), embeddings=True)
    assert found.layers == (("embed", "lm_head"), ("up",), ("down",))
    both = copy.deepcopy(model)
    prepare(both, found.candidates[2], ignore=("up", "down"), embeddings=True)
    assert found.rises[0, 2] == pytest.approx(float(loss(both)), rel=1e-5)
    best = allocate(found, int(found.bytes[:, 2].sum()))
    assert best.choice["embed"] == best.choice["lm_head"] and best.bytes <= found.bytes[:, 2].sum()
    prepare(model, WeightQuantizer(8), ignore=(), rules=best.rules, embeddings=True)
    assert {name: layer.quantizer for name, layer in quantized_layers(model)} == best.choice
    assert exported_bytes(model, torch.float32) - 4 * (24 + 16) == best.bytes


def test_estimates_are_fisher_weighted_errors_in_float64():
    model = Model()
    model.up.weight.requires_grad_(False)

    def loss(model, row):
        return nn.functional.cross_entropy(model(row[:-1]), row[1:])

    model.down.weight.grad = kept = torch.ones_like(model.down.weight)
    found = estimate(model, candidates(8), loss, IDS, ignore=())
    assert not model.up.weight.requires_grad and model.down.weight.grad is kept and (kept == 1).all()
    double = copy.deepcopy(model).double().requires_grad_()
    for row, (name,) in enumerate(found.layers):
        weight = double.get_submodule(name).weight
        fisher = sum(torch.autograd.grad(loss(double, ids), weight)[0].square() for ids in IDS) / len(IDS)
        for column, quantizer in enumerate(found.candidates):
            error = quantizer.fake_quantize(weight.detach().float()).double() - weight
            assert found.rises[row, column] == pytest.approx(0.5 * (fisher * error**2).sum().item(), rel=1e-4)


def test_estimates_foretell_the_divergence_with_labels_of_the_model_itself():
    """Of single examples with the expected label; off-diagonal terms are what keeps it from being equal."""
    model = Model().eval()
    full = model(IDS).detach()
    generator = torch.Generator().manual_seed(0)
    drawn_labels = [(ids, torch.multinomial(logits.softmax(-1), 200, True, generator=generator).T)
                    for ids, logits in zip(IDS.flatten(), full.flatten(0, 1).split(1), strict=True)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0][None])[0], batch[1][0])

    examples = [(ids, label) for ids, labels in drawn_labels for label in labels]
    guess = estimate(model, candidates(8), loss, examples[::20], ignore=())
    found = measure(model, candidates(8), lambda model: divergence(full)(model) * len(IDS) / IDS.numel(), ignore=())
    ratio = guess.rises / found.rises
    assert (ratio > 0.3).all() and (ratio < 3).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: measure(model, [], lambda model: 0.0), "no candidate"),
    (lambda model: measure(model, [WeightQuantizer(4, 5)], lambda model: 0.0), "up: groups of 5 do not divide"),
    (lambda model: measure(model, candidates(), lambda model: math.inf), "in full precision: the loss is inf"),
    (lambda model: estimate(model, candidates(), lambda model, ids: model(ids).mean(), []), "there is no batch"),
    (lambda model: estimate(model, candidates(), lambda model, ids: 0 * model(ids).mean(), IDS), "has no gradient"),
    (lambda model: estimate(model, candidates(), lambda model, ids: math.nan * model(ids).mean(), IDS),
     "the squared gradient of up: the loss is nan"),
])
def test_what_cannot_be_compared_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(Model())


# ---- bytes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_export(dtype):
    schemes = [{"kind": kind, "rule": rule} for kind, rules in RULES.items() for rule in rules if kind != "int"]
    schemes += [{"bits": bits, "symmetric": symmetric, **how} for bits in (8, 4, 3, 2) for symmetric in (True, False)
                for how in ({}, {"group_size": 3}, {"per_tensor": True})]
    for how, activations in itertools.product(schemes, (None, ActivationQuantizer())):
        model = nn.Sequential(nn.Linear(27, 7), nn.Linear(9, 5, bias=False), nn.Embedding(9, 6))
        quantizer = WeightQuantizer(scale_dtype=dtype, **how)
        embeddings = activations is None
        prepare(model, quantizer, activations=activations, embeddings=embeddings)
        ours = sum(stored_bytes(layer.weight.shape, quantizer, activations) for _, layer in quantized_layers(model))
        rest = 7 + (0 if embeddings else model[2].weight.numel())
        assert ours == exported_bytes(model, dtype) - rest * dtype.itemsize, how


def test_bytes_of_a_sensitivity_are_of_whole_numbers():
    found = measure(Model(), candidates(8), lambda model: 0.0, activations=ActivationQuantizer())
    assert found.bytes.dtype == numpy.int64 and found.bytes[0, 0] == 24 * 16 + 4 * 24 * 2


# ---- allocation

@settings(max_examples=60, deadline=None)
@given(some.integers(0, 10**6), some.integers(1, 5), some.integers(1, 5), some.sampled_from([40, 10**5, 10**10]),
       some.sampled_from([1.0, 9.0]), some.booleans())
def test_allocations_are_those_of_brute_force(seed, layers, choices, size, spread, short):
    sensitivity = drawn(seed, layers, choices, size, spread)
    sizes, rises = every(sensitivity)
    for budget in (int(sizes[seed % len(sizes)]) - short, int(sizes.max()), math.inf):  # a byte short of one
        if budget >= sizes.min():
            found = allocate(sensitivity, budget)
            assert found.bytes <= budget
            assert found.rise == pytest.approx(rises[sizes <= budget].min(), rel=1e-10) and found.gap == 0


@settings(max_examples=12, deadline=None)
@given(some.integers(0, 10**6), some.integers(1, 30), some.integers(2, 5), some.sampled_from([50, 10**9]))
def test_the_curve_is_nowhere_above_uniform_bits_and_falls(seed, layers, choices, size):
    sensitivity = drawn(seed, layers, choices, size)
    found, points = curve(sensitivity, 6), uniform(sensitivity)
    assert found[0].bytes == sensitivity.bytes.min(1).sum()
    assert found[-1].rise == pytest.approx(sensitivity.rises.min(1).sum())
    for before, after in itertools.pairwise(found):
        assert after.bytes > before.bytes and after.rise < before.rise
    for point in points:
        assert min(one.rise for one in found if one.bytes <= point.bytes) <= point.rise * (1 + 1e-12)


def test_a_large_model_is_allocated_to_the_byte():
    """As many layers as a Llama of 70 billion parameters has; the budget is a byte short of an optimum."""
    numbers = numpy.random.default_rng(0)
    size = numbers.choice([4096 * 4096, 4096 * 11008, 4096 * 1024], 560)
    counts = numpy.stack([size // 8 * bits + 8190 + bits for bits in (8, 4, 3, 2)], 1)
    rises = 10 ** numbers.uniform(-3, 0, (560, 1)) * numpy.array([1e-4, 0.02, 0.1, 0.5])
    sensitivity = Sensitivity(tuple((str(number),) for number in range(560)), candidates()[:4], rises, counts)
    best = allocate(sensitivity, int(counts[:, 1].sum()))
    short = allocate(sensitivity, best.bytes - 1)
    assert best.gap == short.gap == 0 and short.bytes < best.bytes and short.rise > best.rise
    assert best.rise < 0.7 * uniform(sensitivity)[1].rise


def test_what_is_best_by_the_time_limit_has_its_gap():
    sensitivity = drawn(0, 40, 5, 10**6)
    budget = int(sensitivity.bytes.mean(1).sum())
    early, best = allocate(sensitivity, budget, time_limit=0.0), allocate(sensitivity, budget)
    assert early.bytes <= budget and early.rise - early.gap <= best.rise < early.rise


def test_a_budget_of_seconds():
    sensitivity = drawn(5, 4, 4, 1000)
    seconds = numpy.random.default_rng(1).uniform(1e-5, 1e-3, (4, 4))
    found = allocate(sensitivity, float(seconds.mean(1).sum()), seconds)
    layers = range(4)
    rises, took = zip(*[(sensitivity.rises[layers, chosen].sum(), seconds[layers, chosen].sum())
                        for chosen in itertools.product(range(4), repeat=4)], strict=True)
    fits = numpy.array(took) <= seconds.mean(1).sum()
    assert found.rise == pytest.approx(numpy.array(rises)[fits].min()) and found.seconds <= seconds.mean(1).sum()
    with pytest.raises(ValueError, match="needed for 4 layers and 4 candidates, not"):
        allocate(sensitivity, 1.0, seconds[:2])
    with pytest.raises(ValueError, match=r"a budget of 1e-06 seconds is below the least .*, 0\.\d+ seconds"):
        allocate(sensitivity, 1e-6, seconds)


@pytest.mark.parametrize("budget", [-1, 0, 3999, math.nan])
def test_a_budget_that_cannot_be_met_names_the_least(budget):
    sensitivity = Sensitivity((("a",), ("b",)), candidates()[:2], numpy.ones((2, 2)),
                              numpy.array([[4000, 3000], [1000, 1500]]))
    with pytest.raises(ValueError, match="below the least that these candidates can take, 4,000 bytes"):
        allocate(sensitivity, budget)


def test_an_allocation_survives_json_and_prepares_a_model():
    model = Model()
    found = measure(model, [*candidates(8, torch.bfloat16), None], divergence(model(IDS).detach()))
    best = allocate(found, 900)
    again = Allocation.from_json(json.loads(json.dumps(best.to_json())))
    assert again == best
    names = prepare(model, WeightQuantizer(8), rules=again.rules)
    assert {name: layer.quantizer for name, layer in quantized_layers(model)} == best.choice
    assert names == ["up", "down"] and len(set(best.choice.values())) == 2


def test_names_with_brackets_are_no_patterns():
    model = nn.ModuleDict({"a[1]": nn.Linear(4, 4), "a1": nn.Linear(4, 4)})
    choice = {"a[1]": WeightQuantizer(8), "a1": WeightQuantizer(2)}
    prepare(model, WeightQuantizer(4), rules=Allocation(choice, 0, 0.0).rules)
    assert {name: layer.quantizer.bits for name, layer in quantized_layers(model)} == {"a[1]": 8, "a1": 2}


def test_rows_and_picture(tmp_path):
    sensitivity = drawn(3, 6, 5, 10**6)
    found = curve(sensitivity, 5)
    table = rows(found)
    assert [row["bytes"] for row in table] == [one.bytes for one in found] and json.dumps(table)
    assert all(sum(row["layers"].values()) == 6 for row in table)
    drawn_file = draw_curve(found, uniform(sensitivity), tmp_path / "curve.png", [one.rise for one in found])
    assert image.imread(drawn_file).shape[:2] == (432, 840)


def test_the_benchmark_prints_a_table_and_json(tmp_path, capsys):
    from benchmarks.quantization import bit_allocation as benchmark

    (tmp_path / "text").write_text(sentences(0, 160))
    benchmark.main(["--text", str(tmp_path / "text"), "--steps", "2", "--blocks", "1", "--json",
                    str(tmp_path / "found.json"), "--picture", str(tmp_path / "found.png")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["scheme"] for row in found["rows"]] == ["8 bits", "4 bits", "3 bits", "2 bits", "ternary"]
    for row in found["rows"]:
        assert row["measured"]["bytes"] <= row["bytes"] and row["measured"]["gap"] == 0
        assert row["measured"]["predicted"] <= row["uniform"]["predicted"]
    assert "| 4 bits | 92,272 |" in capsys.readouterr().out and (tmp_path / "found.png").exists()

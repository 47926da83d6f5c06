"""The quantizer against brute force, its gradients, and training that sees what is exported."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.qat import Quantized, prepare, quantized_layers, set_bits
from strategies.quantization.quantizer import RULES, WeightQuantizer

EVERY = [{"kind": kind, "rule": rule} for kind, rules in RULES.items() for rule in rules]


def grouped(weight: torch.Tensor, group: int | None) -> torch.Tensor:
    return weight.double().flatten(1).unflatten(1, (-1, group or weight[0].numel()))


def nearest(groups: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Every weight (outputs, groups, size) as the nearest of its group's levels (outputs, groups, levels)."""
    distance = (groups.unsqueeze(-1) - levels.unsqueeze(-2)).abs()
    return levels.unsqueeze(-2).expand(*distance.shape).gather(-1, distance.argmin(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_becomes_the_nearest_on_its_grid(bits, group, symmetric):
    """Survey eq. 11 by brute force in float64: the largest weight, or both ends of the range, lie on the grid."""
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    groups = grouped(weight, group)
    whole = torch.arange(-2 ** (bits - 1), 2 ** (bits - 1), dtype=torch.float64)
    if symmetric:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        levels = extreme / whole[0] * whole
    else:
        least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = ((most - least) / (2**bits - 1)).clamp(min=1e-12)
        levels = (whole - (whole[0] - least / step).round()) * step
    ours = WeightQuantizer(bits, group, symmetric=symmetric).fake_quantize(weight)
    assert torch.allclose(ours.double(), nearest(groups, levels).reshape(weight.shape), rtol=1e-5, atol=1e-9)


def test_no_number_is_left_unused():
    """At two bits one of four: the largest weight lies on -2, whichever side of zero it is on."""
    for sign in (1, -1):
        weight = sign * torch.tensor([[1.0, 0.52, -0.45, 0.1]])
        found = WeightQuantizer(2).fake_quantize(weight)
        assert torch.equal(found, sign * torch.tensor([[1.0, 0.5, -0.5, 0.0]]))


def test_ternary_and_binary_numbers_are_those_of_their_papers():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    mean = weight.abs().mean(1, keepdim=True)
    assert torch.allclose(WeightQuantizer(kind="ternary").fake_quantize(weight),
                          mean * (weight / mean).round().clamp(-1, 1)), "BitNet b1.58, eq. 1-3, by channel"
    assert torch.allclose(WeightQuantizer(kind="binary").fake_quantize(weight), mean * weight.sign()), "XNOR-Net eq. 6"
    whole = WeightQuantizer(kind="ternary", per_tensor=True).fake_quantize(weight)
    assert whole.unique().tolist() == pytest.approx([-float(weight.abs().mean()), 0, float(weight.abs().mean())])


def test_the_least_squared_error_is_that_of_a_search_over_all_scales():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    groups = grouped(weight, None)
    for bits, apart in ((2, 1.01), (3, 1.01), (4, 1.02)):
        whole = torch.arange(-2 ** (bits - 1), 2 ** (bits - 1), dtype=torch.float64)
        best = torch.full((8, 1), torch.inf, dtype=torch.float64)
        for size in torch.linspace(0.05, 2.0, 800, dtype=torch.float64):
            for sign in (1, -1):
                levels = (sign * size * whole).expand(8, 1, -1)
                best = torch.minimum(best, (nearest(groups, levels) - groups).square().sum(-1))
        found, least = ((WeightQuantizer(bits, rule=rule).fake_quantize(weight).double() - weight).square().sum(
            1, keepdim=True) for rule in ("mse", "minmax"))
        assert (found <= apart * best).all() and (found <= least + 1e-9).all()


def test_the_best_ternary_scale_is_found_exactly():
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(2)) ** 3
    found = (WeightQuantizer(kind="ternary", rule="mse").fake_quantize(weight) - weight).square().sum(1).double()
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    for size in torch.linspace(0.001, float(weight.abs().max()), 20_000, dtype=torch.float64):
        ternary = size * (weight / size).round().clamp(-1, 1)
        best = torch.minimum(best, (ternary - weight).square().sum(1))
    assert (found <= best * (1 + 1e-6)).all()


@settings(max_examples=120, deadline=None)
@given(some.integers(0, 10**6), some.sampled_from(EVERY), some.sampled_from([2, 3, 4, 8]), some.sampled_from([None, 8]),
       some.booleans(), some.floats(1e-7, 1e4), some.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fake_is_exactly_the_exported_numbers_times_scales(seed, which, bits, group, symmetric, size, scale_dtype):
    """Silent error 11: training and export that quantize differently."""
    weight = size * torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    whole = which["kind"] == "int"
    quantizer = WeightQuantizer(bits if whole else None, group, scale_dtype, symmetric=symmetric or not whole, **which)
    grid = quantizer.grid(weight)
    numbers = quantizer.numbers(weight, grid)
    assert numbers.dtype is (torch.float8_e4m3fn if which["kind"] == "fp8" else torch.int8)
    assert (numbers.float() >= quantizer.lowest).all() and (numbers.float() <= quantizer.highest).all()
    assert grid.scale.dtype is scale_dtype and (grid.scale != 0).all()
    for ratio in (None, torch.tensor(0.7)) if quantizer.searched else (None,):
        grid = quantizer.grid(weight, ratio)
        found = quantizer.dequantize(quantizer.numbers(weight, grid), grid, torch.float32)
        assert torch.equal(quantizer.fake_quantize(weight, ratio), found)
        assert torch.equal(quantizer.fake_quantize(weight, grid=grid), found)


@pytest.mark.parametrize("which", [which for which in EVERY if which["rule"] != "learned"])
def test_gradient_goes_straight_through(which):
    weight = torch.randn(3, 8, requires_grad=True)
    upstream = torch.randn(3, 8)
    WeightQuantizer(None, 4, **which).fake_quantize(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("which", [{}, {"symmetric": False}, {"kind": "ternary"}, {"kind": "binary"}])
def test_learned_scales_have_the_gradient_of_lsq(which):
    """Against autograd of the definition in float64, rounding replaced by the identity (Esser et al. 2020, eq. 1-3)."""
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ratio = torch.tensor([[0.4, -0.5], [0.8, 0.9], [0.6, 1.02]]).abs_().requires_grad_()
    upstream = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(None if "kind" in which else 3, 8, rule="learned", **which)
    quantizer.fake_quantize(weight, ratio).backward(upstream)
    assert torch.equal(weight.grad, upstream)

    covering = quantizer.grid(weight, torch.ones(3, 2))
    r = ratio.detach().double().requires_grad_()
    s = (r * covering.scale).unsqueeze(-1)
    w, zero = weight.detach().double().unflatten(1, (-1, 8)), covering.zero_point
    if quantizer.kind == "binary":
        numbers = w.sign()
    else:
        shift = 0 if zero is None else zero.unsqueeze(-1)
        inner = w / s
        inner = inner + (inner.round() - inner).detach() + shift
        numbers = inner.clamp(quantizer.lowest, quantizer.highest) - shift
    (numbers * s).flatten(1).backward(upstream.double())
    assert torch.allclose(ratio.grad.double(), r.grad, rtol=1e-5, atol=1e-5)


def test_step_uses_quantized_values_and_moves_the_full_precision_ones():
    layer = nn.Sequential(nn.Linear(8, 4))
    prepare(layer, WeightQuantizer(4, 4))
    before = layer[0].weight.detach().clone()
    x = torch.randn(5, 8)
    out = layer(x)
    quantized = WeightQuantizer(4, 4).fake_quantize(before)
    assert torch.equal(out, nn.functional.linear(x, quantized, layer[0].bias)) and not torch.equal(quantized, before)
    out.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-4).step()
    assert torch.allclose(layer[0].weight, before - 1e-4 * x.sum(0).expand(4, 8), atol=1e-6)


# ---- layers

class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up, self.down, self.lm_head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.down(self.up(self.embed(ids))))


def test_head_and_tied_weights_stay_in_full_precision():
    assert prepare(Model(False), WeightQuantizer()) == ["up", "down"]
    assert prepare(Model(True), WeightQuantizer(), ignore=()) == ["up", "down"]
    assert prepare(Model(False), WeightQuantizer(), ignore=("d*",)) == ["up", "lm_head"]


def test_embeddings_are_quantized_when_asked_for_and_tied_heads_with_them():
    model = Model(tied=True)
    assert prepare(model, WeightQuantizer(4, 4, rule="learned"), embeddings=True) == ["embed", "up", "down", "lm_head"]
    assert model.lm_head.log_ratio is model.embed.log_ratio
    assert torch.equal(model.embed(torch.arange(10)), model.lm_head.effective_weight)
    assert prepare(Model(False), WeightQuantizer(), embeddings=True) == ["embed", "up", "down"], "its head is ignored"


def test_rules_give_layers_their_own_numbers():
    model = Model()
    prepare(model, WeightQuantizer(4), ignore=(), rules=[("down", WeightQuantizer(kind="ternary")), ("lm_*", None)])
    assert {name: layer.quantizer.kind for name, layer in quantized_layers(model)} == {"up": "int", "down": "ternary"}


def test_names_of_weights_do_not_change():
    model = Model(False)
    names = list(model.state_dict())
    prepare(model, WeightQuantizer())
    assert list(model.state_dict()) == names and len(list(quantized_layers(model))) == 2


@pytest.mark.parametrize(("quantizer", "how", "message"), [
    (WeightQuantizer(4, 5), {"ignore": ()}, "up: groups of 5 do not divide its 8 inputs"),
    (WeightQuantizer(), {"ignore": ("*",)}, r"no linear layer to quantize outside \['\*'\]"),
    (WeightQuantizer(), {"ignore": ("attention.*",)}, r"'attention\.\*' in `ignore` or `rules` matches no layer; names "
     "look like up"),
    (WeightQuantizer(), {"rules": [("up_*", None)]}, r"'up_\*' in `ignore` or `rules` matches no layer"),
])
def test_mistakes_name_the_layer_and_leave_the_model_alone(quantizer, how, message):
    model = Model(False)
    with pytest.raises(ValueError, match=message):
        prepare(model, quantizer, **how)
    assert not any(isinstance(module, Quantized) for module in model.modules())


@pytest.mark.parametrize(("value", "message"), [(math.nan, "down: a weight is not finite"),
                                                (0.0, "down: all weights are zero")])
def test_weights_without_a_scale_are_named(value, message):
    model = Model()
    with torch.no_grad():
        model.down.weight.fill_(value)
    with pytest.raises(ValueError, match=message):
        prepare(model, WeightQuantizer())
    assert not any(isinstance(module, Quantized) for module in model.modules())


@pytest.mark.parametrize(("how", "message"), [
    ({"bits": 9}, "2 to 8 bits, not 9"), ({"bits": 1}, "one bit is the kind `binary`"),
    ({"kind": "ternary", "bits": 4}, "ternary weights have 2 bits, not 4"),
    ({"kind": "fp8", "rule": "learned"}, "scales of fp8 weights come from minmax or mse, not learned"),
    ({"kind": "binary", "symmetric": False}, "have no zero point"),
    ({"per_tensor": True, "group_size": 8}, "not of both"),
])
def test_what_no_quantiser_is_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        WeightQuantizer(**how)


def test_a_grid_that_is_fixed_stays_whatever_the_weights_become():
    model = Model()
    prepare(model, WeightQuantizer(4, 4, symmetric=False))
    grid = model.up.grid()
    model.up.fix(grid)
    with torch.no_grad():
        model.up.weight.mul_(3)
    assert torch.equal(model.up.grid().scale, grid.scale) and torch.equal(model.up.grid().zero_point, grid.zero_point)
    assert torch.equal(model.up.effective_weight, model.up.quantizer.fake_quantize(model.up.weight, grid=grid))
    assert not any(name.endswith(("scale", "point")) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("rule", ["minmax", "learned"])
def test_bits_can_fall_while_training(rule):
    model = Model()
    prepare(model, WeightQuantizer(2, 4, rule=rule), rules=[("down", WeightQuantizer(4, 4, rule=rule))])
    before = model.up.grid().scale.clone()
    set_bits(model, 8)
    assert [layer.quantizer.bits for _, layer in quantized_layers(model)] == [8, 8]
    near = (model.up.effective_weight - model.up.weight).square().mean()
    set_bits(model, 2)
    assert [layer.quantizer.bits for _, layer in quantized_layers(model)] == [2, 4], "no fewer than prepared for"
    assert near < 0.5 * (model.up.effective_weight - model.up.weight).square().mean()
    assert torch.allclose(model.up.grid().scale, before, rtol=1e-5)


def test_learned_scales_begin_at_the_least_squared_error_and_are_trained():
    model = Model()
    prepare(model, WeightQuantizer(3, 4, rule="learned"))
    best = WeightQuantizer(3, 4, rule="mse").fake_quantize(model.up.weight)
    assert torch.allclose(model.up.effective_weight, best, atol=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.arange(10)).square().sum().backward()
    before = model.up.log_ratio.detach().clone()
    optimizer.step()
    assert ((model.up.log_ratio - before).abs() > 1e-4).all()


@pytest.mark.parametrize("rule", ["mse", "learned"])
def test_scales_survive_an_engine_that_gathers_in_half_precision(rule):
    """Kept ratios are rounded to bf16 where FSDP2 and ZeRO gather: by no more than weights are, half a step of 2^-7."""
    model = Model()
    with torch.no_grad():
        model.up.weight[:, :4] = 0  # a group with nothing to scale
    prepare(model, WeightQuantizer(4, 4, rule=rule))
    found = model.up.quantizer._best(model.up.weight)[0].double()
    wanted = torch.where(found == 0, 1.0, found)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, kept in model.up.named_parameters():
            if name.endswith("_ratio"):
                kept.data = kept.data.to(dtype)
        error = (model.up.grid().scale.double() / wanted - 1).abs().max()
        assert error < (1e-6 if dtype == torch.float32 else 2**-8), (dtype, error)


def test_kernels_of_convolutions_have_a_scale_for_each_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(2, 4, 3))
    assert prepare(model, WeightQuantizer(8)) == ["0", "1"]
    assert model[0].grid().scale.shape == (4, 1) and model[0].numbers().shape == (4, 3, 3, 3)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(model[0](x), nn.functional.conv2d(x, model[0].effective_weight, model[0].bias, padding=1))


# ---- activations

def test_activations_have_a_scale_for_each_token():
    values = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    values *= torch.tensor([1.0, 100.0, 0.0])[:, None]
    found = ActivationQuantizer().fake_quantize(values)
    scale = values.abs().amax(-1, keepdim=True) / 127.5
    assert torch.allclose(found, (values / scale.clamp(min=1e-20)).round().clamp(-128, 127) * scale)
    assert (found - values).abs().amax(-1).max() <= 0.51 * scale.max() and found[:, 2].abs().max() == 0
    small = ActivationQuantizer("fp8").fake_quantize(values)
    assert ((small - values).abs() <= 2**-4 * values.abs() + values.abs().amax(-1, keepdim=True) / 448).all()


def test_gradient_of_activations_stops_where_they_are_clipped():
    values = torch.tensor([[0.3, 5.0, -0.2, -7.0]], requires_grad=True)
    ActivationQuantizer(dynamic=False).fake_quantize(values, torch.tensor([0.01])).backward(torch.ones(1, 4))
    assert values.grad.tolist() == [[1, 0, 1, 0]]
    values.grad = None
    ActivationQuantizer().fake_quantize(values).backward(torch.ones(1, 4))
    assert values.grad.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("how", [{}, {"rule": "learned"}, {"symmetric": False, "rule": "learned"}])
@pytest.mark.parametrize("activations", [None, ActivationQuantizer()])
def test_baked_model_computes_the_same(how, activations):
    model = Model(tied=True)
    prepare(model, WeightQuantizer(4, 4, **how), embeddings=True, activations=activations)
    before = model(torch.arange(10))
    freeze_quantized(model, torch.float32)
    assert torch.equal(model(torch.arange(10)), before) and not list(quantized_layers(model))
    assert [name for name, _ in model.named_parameters()] == [
        "embed.weight", "up.weight", "up.bias", "down.weight", "down.bias"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_positive_scales_cover_the_weights_and_are_as_small_as_that_allows(bits, rule):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits))
    weight[4:] = weight[4:].abs() * torch.tensor([[1.0], [-1.0]])  # one channel above zero, and one below
    quantizer = WeightQuantizer(bits, 8, rule=rule, positive=True)
    scale = quantizer.grid(weight).scale
    assert scale.min() > 0 and WeightQuantizer(bits, 8, rule=rule).grid(weight).scale.min() < 0
    if rule == "minmax":
        reach = grouped(weight, 8) / scale.double()[..., None]
        above, below = reach.amax(-1) - quantizer.highest, quantizer.lowest - reach.amin(-1)
        assert torch.all(torch.maximum(above, below).abs() < 1e-4)  # one end of the range is reached, none is passed


def test_scales_beside_zero_points_are_not_told_to_be_positive():
    with pytest.raises(ValueError, match="positive without being told to be"):
        WeightQuantizer(4, symmetric=False, positive=True)

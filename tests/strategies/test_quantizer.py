"""The quantiser against brute force, its gradient, and training that sees what is exported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from strategies.quantization.baking import bake
from strategies.quantization.qat import QATLinear, prepare, quantized_layers
from strategies.quantization.quantizer import WeightQuantizer


def brute_force(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Survey eq. 11, one weight at a time, in float64."""
    top = 2 ** (bits - 1) - 1
    result = torch.empty_like(weight, dtype=torch.float64)
    width = group or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            part = weight[row, start:start + width].double()
            scale = part.abs().max() / top
            for column, value in enumerate(part):
                candidates = torch.arange(-top, top + 1, dtype=torch.float64) * scale
                result[row, start + column] = candidates[(candidates - value).abs().argmin()] if scale else 0.0
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 4, 8])
def test_every_weight_becomes_the_nearest_on_its_grid(bits, group):
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    ours = WeightQuantizer(bits, group).fake_quantize(weight)
    assert torch.allclose(ours.double(), brute_force(weight, bits, group), rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(some.integers(0, 10**6), some.sampled_from([4, 8]), some.sampled_from([None, 8]), some.floats(1e-12, 1e4),
       some.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fake_is_exactly_the_exported_integers_times_scales(seed, bits, group, size, scale_dtype):
    """Silent error 11: training and export that quantise differently."""
    weight = size * torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(bits, group, scale_dtype)
    scale = quantizer.scale(weight)
    integers = quantizer.integers(weight, scale)
    assert integers.dtype is torch.int8 and integers.abs().max() <= quantizer.largest
    assert scale.dtype is scale_dtype and (scale > 0).all()
    assert torch.equal(quantizer.fake_quantize(weight), quantizer.dequantize(integers, scale, torch.float32))


def test_gradient_goes_straight_through():
    weight = torch.randn(3, 8, requires_grad=True)
    upstream = torch.randn(3, 8)
    WeightQuantizer(4, 4).fake_quantize(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_step_uses_quantised_values_and_moves_the_full_precision_ones():
    layer = nn.Sequential(nn.Linear(8, 4))
    prepare(layer, WeightQuantizer(4, 4))
    before = layer[0].weight.detach().clone()
    x = torch.randn(5, 8)
    out = layer(x)
    quantised = WeightQuantizer(4, 4).fake_quantize(before)
    assert torch.equal(out, nn.functional.linear(x, quantised, layer[0].bias)) and not torch.equal(quantised, before)
    out.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-4).step()
    assert torch.allclose(layer[0].weight, before - 1e-4 * x.sum(0).expand(4, 8), atol=1e-6)


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up, self.down, self.lm_head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def test_head_and_tied_weights_stay_in_full_precision():
    assert prepare(Model(False), WeightQuantizer()) == ["up", "down"]
    assert prepare(Model(True), WeightQuantizer(), ignore=()) == ["up", "down"]
    assert prepare(Model(False), WeightQuantizer(), ignore=("d*",)) == ["up", "lm_head"]


def test_names_of_parameters_do_not_change():
    model = Model(False)
    names = list(model.state_dict())
    prepare(model, WeightQuantizer())
    assert list(model.state_dict()) == names and len(list(quantized_layers(model))) == 2


@pytest.mark.parametrize(("quantizer", "ignore", "message"), [
    (WeightQuantizer(4, 5), (), "up: groups of 5 do not divide its 8 inputs"),
    (WeightQuantizer(), ("*",), "no linear layer to quantise outside"),
    (WeightQuantizer(), ("attention.*",), "'attention.*' in `ignore` matches no linear layer; names look like up"),
])
def test_mistakes_name_the_layer_and_leave_the_model_alone(quantizer, ignore, message):
    model = Model(False)
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("(", r"\(")):
        prepare(model, quantizer, ignore)
    assert not any(isinstance(module, QATLinear) for module in model.modules())


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        WeightQuantizer(3)


def test_baked_model_computes_the_same():
    model = Model(False)
    prepare(model, WeightQuantizer(4, 4))
    x = torch.randn(2, 8)
    before = model.down(model.up(x))
    bake(model, torch.float32)
    assert torch.equal(model.down(model.up(x)), before) and not list(quantized_layers(model))

"""Products that quantize their weight twice are torch's own, to the bit, and keep no quantized copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from strategies.memory.meter import measure
from strategies.memory.tracker import LiveBytes
from strategies.quantization import qat
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer

QUANTIZERS = {
    "8 bits": WeightQuantizer(8, 8), "2 bits in bf16": WeightQuantizer(2, 8, torch.bfloat16),
    "ternary": WeightQuantizer(kind="ternary"), "tensor": WeightQuantizer(4, per_tensor=True),
    "zero points": WeightQuantizer(4, 8, torch.float16, symmetric=False),
    "learned": WeightQuantizer(4, 8, rule="learned"), "learned zero points": WeightQuantizer(
        3, 8, rule="learned", symmetric=False)}


def inputs() -> Iterator[torch.Tensor]:
    torch.manual_seed(1)
    for shape in ((5, 16), (3, 5, 16), (2, 3, 4, 16), (1, 1, 16)):
        yield torch.randn(shape)
    yield torch.randn(3, 16, 5).transpose(1, 2)
    yield torch.randn(3, 1, 16).expand(3, 4, 16)


def found(model: nn.Module, x: torch.Tensor, half: bool) -> list[torch.Tensor]:
    """Output, and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = model(x)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arriving = torch.arange(out.numel()).sin().view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *weights], arriving)]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) and left.dtype is right.dtype for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_and_gradients_are_those_of_torchs_own_products(monkeypatch, name, half):
    torch.manual_seed(0)
    for layer in (nn.Linear(16, 24), nn.Linear(16, 24, bias=False), Conv1D(24, 16), nn.Linear(16, 1)):
        model = nn.Sequential(copy.deepcopy(layer))
        prepare(model, QUANTIZERS[name])
        for x in inputs():
            if isinstance(layer, Conv1D) and not x.is_contiguous():
                continue
            ours = found(model, x, half)
            with monkeypatch.context() as patched:
                patched.setattr(qat, "serves", lambda weight: False)
                assert same_bits(ours, found(model, x, half)), (layer, x.shape, x.stride())


def test_the_storage_of_a_weight_can_still_be_resized():
    """As FSDP2 does to free gathered weights between forward and backward."""
    model = nn.Sequential(nn.Linear(16, 16))
    prepare(model, WeightQuantizer(4, 8, rule="learned"))
    model(torch.randn(2, 16)).sum().backward()
    assert model[0].weight.untyped_storage().resizable()


@pytest.mark.parametrize("rule", ["minmax", "learned"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_no_quantized_copy_waits_for_the_backward(kind, rule):
    model = nn.Sequential(*[kind(256, 256) for _ in range(8)])
    prepare(model, WeightQuantizer(4, 32, rule=rule))
    x, weight = torch.randn(4, 256), 4 * 256 * 256
    held = []
    measured = measure(lambda: held.append(model(x)), "cpu")
    after = int(measured.timeline[-1, 1])
    assert after < 8 * weight * 0.15, "scales of 32 weights, and what learned ones are made of, and nothing else"
    assert measured.peak < after + (2 + (kind is Conv1D)) * weight


def test_a_plan_sees_the_bytes_that_a_step_takes():
    def step(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()

    def made() -> nn.Module:
        model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
        prepare(model, WeightQuantizer(4, 32, rule="learned"))
        return model

    with FakeTensorMode(), LiveBytes() as tracker:
        model, x = made(), torch.randn(64, 128)
        before = tracker.current
        step(model, x)
    real, x = made(), torch.randn(64, 128)
    assert tracker.peak - before == pytest.approx(measure(lambda: step(real, x), "cpu").peak, rel=0.01)


def test_recomputed_blocks_and_a_weight_used_twice_have_the_same_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    prepare(model, WeightQuantizer(2, 8, rule="learned"))
    x = torch.randn(4, 16)

    def gradients(call) -> list[torch.Tensor]:
        return list(torch.autograd.grad(call(call(x)).sum(), list(filter(lambda one: one.requires_grad,
                                                                         model.parameters()))))
    assert same_bits(gradients(model), gradients(lambda values: checkpoint(model, values, use_reentrant=False)))


def test_a_gradient_of_a_gradient_reaches_the_weight():
    """As a penalty on gradients needs; rounding counts as the identity, so a plain layer of those weights is exact."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.randn(3, 8, requires_grad=True)
    prepare(layer, WeightQuantizer(4, 8))
    plain = nn.Linear(8, 8, bias=False)
    plain.weight.data.copy_(layer[0].effective_weight)
    both = []
    for module in (layer, plain):
        inner, = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        both.append(torch.autograd.grad(inner.square().sum(), next(module.parameters()))[0])
    assert torch.allclose(*both, rtol=1e-5)


def test_weights_that_are_not_trained_and_ones_changed_meanwhile():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, WeightQuantizer(4, 8))
    out = model(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    model.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert torch.allclose(x.grad[0], model[0].effective_weight.sum(0), rtol=1e-5)

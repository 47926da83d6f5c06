"""Batch norms folded into the layers before them: outputs stay, and what cannot be folded is said."""

import copy

import pytest
import torch
from torch import nn

from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.folding import fold_batch_norms
from strategies.quantization.qat import QATConv2d, prepare
from strategies.quantization.quantizer import WeightQuantizer


class Residual(nn.Module):
    """As in ResNet: two convolutions with norms, and a third where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())) + self.down(x)).relu_()


def inverted(inputs: int, outputs: int) -> nn.Sequential:
    """As in MobileNetV2: a convolution that widens, one for each channel, one that narrows."""
    wide = 4 * inputs
    return nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
                         nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.BatchNorm2d(wide, eps=1e-3), nn.ReLU6(),
                         nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs, affine=False))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 24), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Dropout(0.3), nn.Linear(24, 10)]


def stem(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


NETS = {"resnet": lambda: nn.Sequential(*stem(8), Residual(8, 8, 1), Residual(8, 16, 2), *head(16)),
        "mobilenet": lambda: nn.Sequential(*stem(8), inverted(8, 8), inverted(8, 12), *head(12)),
        "sequence": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.GELU(),
                                          nn.Conv1d(8, 8, 3, 2), nn.Identity(), nn.BatchNorm1d(8), nn.Flatten(),
                                          nn.LazyLinear(6), nn.BatchNorm1d(6))}
COUNTS = {"resnet": (7, 8), "mobilenet": (8, 9), "sequence": (3, 3)}


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def seen(net: nn.Module) -> nn.Module:
    """A network whose norms have statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for step in range(12):
            net.train()(images(32, step) * 2 + 0.5)
        for norm in net.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and norm.weight is not None:
                norm.weight.uniform_(0.3, 1.7)
                norm.weight[0] *= -1
                norm.bias.normal_()
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_outputs_stay_and_norms_go(name):
    torch.manual_seed(1)
    net, x = seen(NETS[name]()), images(4, 100)
    before = net(x).detach()
    exact = copy.deepcopy(net).double()(x.double()).detach()
    pairs = fold_batch_norms(net, x)
    after = net(x).detach()
    scale = exact.abs().max()
    assert len(pairs) == COUNTS[name][0]
    assert sum(type(part) in (nn.Linear, nn.Conv1d, nn.Conv2d) for part in net.modules()) == COUNTS[name][1]
    assert not any("BatchNorm" in type(part).__name__ for part in net.modules())
    assert (after - before).abs().max() < 1e-5 * scale
    assert (after - exact).abs().max() < 3 * (before - exact).abs().max() + 1e-6 * scale
    for layer, norm in pairs:
        assert isinstance(net.get_submodule(norm), nn.Identity) and net.get_submodule(layer).bias is not None


def test_a_folded_layer_is_that_of_the_equation_in_float64():
    net = seen(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    conv, norm = copy.deepcopy(net[0]).double(), copy.deepcopy(net[1]).double()
    fold_batch_norms(net, images(1, 0))
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    assert torch.equal(net[0].weight, (conv.weight * factor[:, None, None, None]).float())
    assert torch.equal(net[0].bias, ((conv.bias - norm.running_mean) * factor + norm.bias).float())


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_folded_networks_quantise_to_8_bits_and_stay_near(name):
    torch.manual_seed(1)
    net, x = seen(NETS[name]()), images(32, 100)
    before = net(x).detach()
    fold_batch_norms(net, x[:1])
    last = [layer for layer, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    coarse = copy.deepcopy(net)
    names = prepare(net, WeightQuantizer(8, rule="mse"))
    assert sum(isinstance(net.get_submodule(layer), QATConv2d) for layer in names) == COUNTS[name][1] - 2
    assert last in names
    spread = before.std()
    assert (net(x) - before).std() < 0.02 * spread
    assert (net(x).argmax(-1) == before.argmax(-1)).float().mean() > 0.9
    prepare(coarse, WeightQuantizer(3, rule="mse"))
    assert (coarse(x) - before).std() > 5 * (net(x) - before).std()


def test_folded_networks_take_8_bit_activations_too():
    net, x = seen(NETS["resnet"]()), images(8, 3)
    before = net(x).detach()
    fold_batch_norms(net, x)
    prepare(net, WeightQuantizer(8), activations=ActivationQuantizer())
    assert (net(x) - before).std() < 0.05 * before.std()


# ---- what stays, and what is refused

class Block(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def keeping(self, x):
    self.kept = self.conv(x)
    return self.norm(self.kept), self.kept


@pytest.mark.parametrize("way", [
    lambda self, x: (y := self.conv(x)) + self.norm(y),
    lambda self, x: self.norm(y := self.conv(x)) + y,
    lambda self, x: self.norm(y := self.conv(x)) + y.view(-1).sum(),
    lambda self, x: self.norm(self.conv(x).relu_()),
    lambda self, x: {"seen": (self.norm(y := self.conv(x)), y)},
    lambda self, x: self.norm(y := self.conv(x)) * self.other(y),
    lambda self, x: self.norm(self.conv(x)) + self.conv(x + 1),
    keeping,
])
def test_a_layer_that_is_read_elsewhere_is_refused(way):
    net = Block(way).eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="norm cannot be folded into conv: the layer's output is read elsewhere, too; "
                                         "name the norm in `ignore`"):
        fold_batch_norms(net, images(1, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert fold_batch_norms(net, images(1, 0), ignore=("norm", "other")) == [] and not net.conv._forward_hooks


@pytest.mark.parametrize(("way", "pairs"), [
    (lambda self, x: self.norm(self.conv(x).relu()), []),
    (lambda self, x: self.norm(self.conv(x) + x), []),
    (lambda self, x: self.other(self.conv(x)) + self.norm(x), [("conv", "other")]),
    (lambda self, x: self.norm(self.conv(x)) + self.norm(self.conv(x + 1)), [("conv", "norm")]),
    (lambda self, x: self.conv(x), []),
])
def test_norms_after_something_else_stay(way, pairs):
    torch.manual_seed(0)
    net = Block(way)
    with torch.no_grad():
        for step in range(4):
            net.train()(images(16, step) + 1)
    before = net.eval()(images(2, 9))
    assert fold_batch_norms(net, images(1, 0)) == pairs
    assert torch.allclose(net(images(2, 9)), before, atol=1e-5)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net.eval()


def ways(*names):
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}).eval()
    net.forward = lambda x: net["norm"](net["a"](x)) + net["norm"](net["b"](x) if "b" in names else x)
    return net


@pytest.mark.parametrize(("net", "x", "message"), [
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(5, 4), "^1 uses the statistics of its"),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(), torch.randn(5, 4),
     "1 cannot be folded into 0: the norm has no running statistics"),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(5, 4, 4), "0: its output has its channels"),
    (tied(), torch.randn(5, 4), "1 cannot be folded into 0: its weights are those of 2"),
    (ways("b"), torch.randn(5, 4), "norm cannot be folded into a: the norm follows other layers"),
    (ways(), torch.randn(5, 4), "norm cannot be folded into a: the norm follows other layers"),
])
def test_what_cannot_be_folded_is_said(net, x, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(net, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_examples_are_arguments_or_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, shift=0):
            return self.norm(self.conv(x + shift))

    for example in (images(1, 0), (images(1, 0), 2), {"x": images(1, 0), "shift": 1}):
        assert fold_batch_norms(Two().eval(), example) == [("conv", "norm")]


# ---- into quantized layers

def quantizers():
    return {"int8": WeightQuantizer(8), "int4 with zero points": WeightQuantizer(4, symmetric=False),
            "learned": WeightQuantizer(4, rule="learned"), "one scale": WeightQuantizer(8, per_tensor=True),
            "ternary": WeightQuantizer(kind="ternary"), "binary": WeightQuantizer(kind="binary")}


@pytest.mark.parametrize("name", quantizers())
def test_a_quantized_layer_keeps_its_numbers_and_its_scales_take_the_factor(name):
    net, x = seen(NETS["mobilenet"]()), images(4, 100)
    prepare(net, quantizers()[name])
    before, numbers = net(x).detach(), {layer: part.numbers() for layer, part in net.named_modules()
                                        if isinstance(part, QATConv2d)}
    assert len(fold_batch_norms(net, x)) == COUNTS["mobilenet"][0]
    assert (net(x) - before).abs().max() < 1e-5 * before.abs().max()
    assert all(torch.equal(net.get_submodule(layer).numbers(), kept) for layer, kept in numbers.items())


def test_with_a_scale_for_each_output_it_is_the_same_before_and_after_rounding():
    before, x = seen(NETS["resnet"]()), images(4, 100)
    after = copy.deepcopy(before)
    fold_batch_norms(before, x)
    prepare(before, WeightQuantizer(4))
    prepare(after, WeightQuantizer(4))
    fold_batch_norms(after, x)
    assert (before(x) - after(x)).abs().max() < 1e-5 * after(x).abs().max()


def test_what_would_be_rounded_anew_keeps_its_norm():
    net, x = seen(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))), images(2, 0)
    prepare(net, WeightQuantizer(8, scale_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="half precision"):
        fold_batch_norms(net, x)
    before = net(x)
    assert fold_batch_norms(net, x, strict=False) == [] and torch.equal(net(x), before)

"""A plan for a GPU that is not there counts what a GPU would take, and not the CPU's kernels and tiles."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.common.planned_device import planned_for_gpu
from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets
from strategies.memory.tracker import LiveBytes
from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.lamb import Lamb
from strategies.optimizers.passes import WORTH
from strategies.quantization.quantizer import WeightQuantizer


def peak_of(step):
    with FakeTensorMode(), LiveBytes() as tracker:
        step()
    return tracker.peak


def test_the_loss_is_counted_with_the_tiles_of_a_gpu():
    """4,096 rows of 30,000 logits of student and teacher, 491 MB each: a tile of 1 GiB holds all of them."""
    def loss():
        hidden, weight = torch.empty(4096, 16, requires_grad=True), torch.empty(30_000, 16, requires_grad=True)
        targets = torch.zeros(4096, dtype=torch.long)
        ResponseObjective(0.5, (Divergence("forward_kl"),))(
            hidden, HiddenTargets(torch.empty(4096, 16), Head(torch.empty(30_000, 16))), targets,
            head=Head(weight))[0].backward()

    here = peak_of(loss)
    with planned_for_gpu():
        there = peak_of(loss)
    logits = 4 * 4096 * 30_000
    assert here < 0.3 * logits and there > 3 * logits  # both tiles, and temporaries of whole tiles


@pytest.mark.parametrize("kind", [Lamb, Adafactor])
def test_an_optimizer_is_counted_with_its_updates(kind):
    def step():
        weight = nn.Parameter(torch.empty(1024, WORTH // 512))
        weight.grad = torch.empty_like(weight)
        optimizer = kind([weight])
        optimizer.step()
        with LiveBytes() as tracker:
            optimizer.step()
        found.append(tracker.peak)

    found = []
    with FakeTensorMode():
        step()
        with planned_for_gpu():
            step()
    assert found[0] < 0.2 * 8 * WORTH < 0.9 * 8 * WORTH < found[1]


def test_a_quantizer_is_counted_with_torchs_operations():
    quantizer = WeightQuantizer(bits=4, group_size=32)

    def rounds():
        quantizer.grid(torch.empty(1024, 1024))

    here = peak_of(rounds)
    with planned_for_gpu():
        assert peak_of(rounds) > here

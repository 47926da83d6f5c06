"""Seconds of units by the roofline: beside torch's own count of operations, and by hand for what moves bytes only."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from strategies.rematerialization.price.costs import DEVICES, Device
from strategies.rematerialization.price.unit_seconds import OperationSeconds, unit_seconds

COUNTING = Device("counting", half=1.0, single=1.0, bandwidth=float("inf"), overhead=0.0)  # a second an operation
MOVING = replace(COUNTING, half=float("inf"), single=float("inf"), bandwidth=1.0)  # a second a byte
UNITS = [(), ("first",), ("second",)]


class Two(nn.Module):
    """Two layers, the second recomputed if wanted."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.first, self.recomputed = nn.Linear(8, 16, bias=False), recomputed
        self.second = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Sigmoid())  # whose backward needs its output

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(rows, 8) -> (rows, 4)"""
        hidden = self.first(inputs)
        return checkpoint(self.second, hidden, use_reentrant=False) if self.recomputed else self.second(hidden)


def seconds(model: nn.Module, device: Device) -> dict:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, rows = type(model)(model.recomputed), torch.empty(10, 8)
        return unit_seconds(lambda: fake(rows).sum(), {"model": fake}, {"model": UNITS}, device)["model"]


def test_operations_of_units_are_those_that_torch_counts():
    model = Two()
    found = seconds(model, COUNTING)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(10, 8)).sum().backward()
    assert sum(map(sum, found.values())) == counter.get_total_flops()
    assert found["first",] == (2 * 10 * 8 * 16, 2 * 10 * 8 * 16), "its input has no gradient"
    assert found["second",] == (2 * 10 * 16 * 4, 2 * 2 * 10 * 16 * 4)


def test_recomputation_is_part_of_the_backward_of_its_unit():
    assert seconds(Two(True), COUNTING)["second",] == (2 * 10 * 16 * 4, 3 * 2 * 10 * 16 * 4)
    assert seconds(Two(True), COUNTING)["first",] == seconds(Two(), COUNTING)["first",]


def test_views_and_questions_take_no_time_and_others_move_their_bytes():
    with FakeTensorMode(allow_non_fake_inputs=True), OperationSeconds(MOVING) as clock:
        one = torch.empty(6, 4)
        one.view(4, 6).t().expand(2, 6, 4).detach()
        assert one.device.type == "cpu"
        assert not sum(clock.seconds.values())
        one.add_(1.0)
        assert sum(clock.seconds.values()) == pytest.approx(3 * 4 * 24, abs=4 * 24), "read and written"


def test_sixteen_bit_products_are_as_fast_as_they_were_found_to_be():
    device = replace(DEVICES["a100-80gb"], overhead=0.0, bandwidth=float("inf"))
    with FakeTensorMode(allow_non_fake_inputs=True), OperationSeconds(device, attained=0.5) as clock:
        half, full = (torch.empty(64, 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        half @ half
        quick = sum(clock.seconds.values())
        full @ full
    assert quick == pytest.approx(2 * 64**3 / 156e12)
    assert sum(clock.seconds.values()) - quick == pytest.approx(2 * 64**3 / 19.5e12)

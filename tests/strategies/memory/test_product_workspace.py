"""Buffers of matrix products are counted where nothing is captured."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.common.cpu_products import faster_fp32_products
from strategies.common.planned_device import planned_for_gpu
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import ResponseObjective
from strategies.memory.meter import measure
from strategies.memory.tracker import LiveBytes
from strategies.memory.workspace import product_workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_of_products_are_counted_where_nothing_is_captured(dtype):
    """A loss at its head by whichever library computes its products: what is counted is what is measured."""
    def step() -> None:
        hidden = torch.ones(300, 96, dtype=dtype, requires_grad=True)
        weight = torch.ones(5000, 96, dtype=dtype, requires_grad=True)
        targets = torch.zeros(300, dtype=torch.long)
        ResponseObjective(1.0, ())(hidden, None, targets, head=Head(weight))[0].backward()

    with faster_fp32_products(torch.device("cpu")):
        step()  # what a library sets up at its first call
        measured = measure(step, "cpu")
        with FakeTensorMode(), LiveBytes(workspace=product_workspace) as counted:
            step()
    assert 0 <= counted.peak - (measured.peak - measured.base) < 0.02 * counted.peak


def test_products_that_stand_for_a_gpus_have_none():
    with FakeTensorMode(), planned_for_gpu():
        given = torch.empty(512, 512, dtype=torch.bfloat16)
        assert product_workspace(torch.ops.aten.mm.default, (given, given.T), {}) == 0

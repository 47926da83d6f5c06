"""What optimizers say that their step takes for a moment, against bytes measured in steps on numbers."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from strategies.common.shards import Layout, Piece, lay_out
from strategies.memory.meter import measure
from strategies.memory.tracker import tensors_of
from strategies.optimizers.by_name import build
from strategies.optimizers.transient import Sharing, gathers_updates, traced, transient_bytes
from strategies.rematerialization.capture.fake_tensors import FakeItemMode
from strategies.sharding.rank_residency import ShardingSetup
from trainer.distributed.rank_memory import optimizer_bytes
from trainer.experiment.nodes import Optimizer

NAMES = get_args(Optimizer.model_fields["name"].annotation)
SCALARS = 2048  # bytes: numbers of a step and other small things that differ between a plan and a run


def optimizer_of(name: str, flat: bool) -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64), nn.LayerNorm(64))
    optimizer = build(model, name, lr=1e-3, betas=(0.9, 0.95), eps=None, weight_decay=0.1)
    for group in optimizer.param_groups if flat else ():
        group["params"] = [_first_half(group["params"])]
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    return optimizer


def _first_half(parameters: list[torch.Tensor]) -> torch.Tensor:
    """What a first of two ranks holds of parameters that lie end to end, as in ZeRO."""
    pieces, offset = [], 0
    for parameter in parameters:
        part = parameter.numel() // 2
        pieces.append(Piece("", tuple(parameter.shape), 0, part, offset))
        offset += part
    flat = nn.Parameter(torch.empty(offset).fill_(0.5))
    lay_out(flat, Layout(tuple(pieces)))
    return flat


@pytest.mark.parametrize("flat", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("name", NAMES)
def test_declared_bytes_are_those_of_a_step(name, flat):
    if name == "muon" and flat:
        pytest.skip("Muon takes whole matrices")
    real = optimizer_of(name, flat)
    real.step()
    found = measure(real.step, "cpu", [real])
    with FakeTensorMode(), FakeItemMode():
        planned = optimizer_of(name, flat)
        planned.step()
        declared = transient_bytes(planned, Sharing(ranks=1, largest=96 * 128, on_cpu=True))
    missed = 0.25 if name == "muon" else 0.03  # on CPU, kernels of its 16-bit products copy what they read, unseen
    measured = found.peak - found.base
    assert (1 - missed) * measured - SCALARS <= declared <= 1.03 * measured + SCALARS


def test_muon_gathers_a_whole_update_where_ranks_share_it():
    with FakeTensorMode(), FakeItemMode():
        muon, adamw = optimizer_of("muon", False), optimizer_of("adamw", False)
        muon.step()
        alone, shared = (transient_bytes(muon, Sharing(ranks, largest=96 * 128)) for ranks in (1, 2))
    assert shared == alone + 4 * 96 * 128 and gathers_updates(muon) and not gathers_updates(adamw)


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_of_each_kind_tells_what_all_take(name):
    """A model of four equal layers: state of all, and the peak of a step of all."""
    def made() -> torch.optim.Optimizer:
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 32))
        return build(model, name, lr=1e-3, betas=(0.9, 0.95), eps=None, weight_decay=0.1)

    with FakeTensorMode(), FakeItemMode():
        every = made()
        for group in every.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.ones_like(tensor)
        every.step()
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(every.state))
        found = optimizer_bytes(made(), ShardingSetup("none", 1))
        if name != "adamw8bit":  # whose bytes on CPU are no operations of torch that are seen
            assert found[1] == pytest.approx(traced(every), abs=SCALARS)
    assert found[0] == state > 0

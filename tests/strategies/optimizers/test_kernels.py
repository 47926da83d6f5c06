"""Compiled passes are right against float64, whatever the number of threads, spans and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from strategies.memory.meter import measure
from strategies.optimizers import passes
from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.lamb import Lamb
from strategies.optimizers.transient import Sharing, transient_bytes
from strategies.rematerialization.capture.fake_tensors import FakeItemMode

SHAPES = [(640, 515), (3000,), (70, 3, 3), (2, 300, 500), (16, 7)]
MAKE = {"lamb": lambda params: Lamb(params, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)),
        "lamb, beta 0": lambda params: Lamb(params, lr=1e-2, betas=(0.0, 0.3)),
        "adafactor": lambda params: Adafactor(params, lr=1e-2, weight_decay=0.1)}


def weights_after(make, steps=3, dtype=torch.float32, compiled=True):
    """Weights, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = make(params)
    optimizer.compiled = compiled
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return [param.detach() for param in params], optimizer


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("small", [False, True], ids=["whole", "in spans"])
def test_passes_are_the_step_in_float64_and_nearer_than_torchs_operations(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(passes, "SPAN", 5000)
    wanted, _ = weights_after(MAKE[name], dtype=torch.float64)  # by operations of torch
    ours, _ = weights_after(MAKE[name])
    others, _ = weights_after(MAKE[name], compiled=False)
    for found, other, right in zip(ours, others, wanted, strict=True):
        error, theirs = (float((one - right).abs().max() / right.abs().max()) for one in (found, other))
        assert error < 3e-7 and error < 1.5 * theirs + 6e-8


@pytest.mark.parametrize("name", MAKE)
def test_threads_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(passes, "SPAN", 5000)
    monkeypatch.setattr(passes, "GRAIN", 0)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(weights_after(MAKE[name])[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_shares_cover_everything_once(monkeypatch):
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for sizes in ([5], [1, 1], [100, 1, 1, 1], [1, 1, 1, 100], [3] * 50, [0, 0]):
            runs = passes.shares(np.array(sizes))
            assert len(runs) <= threads
            assert [item for run in runs for item in sizes[run]] == sizes


@pytest.mark.parametrize("make", [Lamb, Adafactor])
def test_only_large_models_pay_for_a_compiler(make):
    small, large = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(passes.WORTH))
    assert not make([small]).compiled and make([large]).compiled and make([small, large]).compiled


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_other_dtypes_and_strides_go_another_way(name):
    params = [nn.Parameter(torch.ones(8, 6, dtype=torch.bfloat16)), nn.Parameter(torch.ones(8, 6)),
              nn.Parameter(torch.ones(8, 6))]
    optimizer = MAKE[name](params)
    optimizer.compiled = True
    params[0].grad = torch.ones(8, 6, dtype=torch.bfloat16)
    params[1].grad, params[2].grad = torch.ones(6, 8).T, torch.ones(8, 6)
    optimizer.step()
    torch.testing.assert_close(params[1], params[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(params[0].float(), params[2], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_autograd_sees_that_weights_changed(name):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = MAKE[name]([weight])
    optimizer.compiled = True
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_a_step_takes_next_to_nothing_and_is_planned_to(name):
    _, real = weights_after(MAKE[name])
    found = measure(real.step, "cpu", [real])
    with FakeTensorMode(), FakeItemMode():
        params = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        for param in params:
            param.grad = torch.empty_like(param)
        planned = MAKE[name](params)
        planned.compiled = True
        planned.step()
        here, elsewhere = (transient_bytes(planned, Sharing(on_cpu=on_cpu)) for on_cpu in (True, False))
    largest = 4 * max(param.numel() for param in params)
    assert found.peak - found.base < largest / 50 and here < largest / 50
    assert elsewhere >= largest and planned.compiled

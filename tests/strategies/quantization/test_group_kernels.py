"""Compiled passes over groups of weights against tensor operations, on awkward numbers and on several threads."""

from __future__ import annotations

import os

import pytest
import torch

from strategies.quantization import group_kernels
from strategies.quantization.group_kernels import by_scale, ranges, rounded


def awkward(groups: int, size: int) -> torch.Tensor:
    """Normal weights with halves, zeros of both signs, subnormal, infinite and undefined ones."""
    torch.manual_seed(size)
    weights = torch.randn(groups, size)
    weights[1] = 0.0
    weights[2] = -0.0
    weights[3, 0], weights[4, 0], weights[5, -1] = torch.nan, torch.inf, -torch.inf
    weights[6] *= 1e-42
    weights[7] = torch.arange(size) / 2 - 1
    weights[8] = -torch.rand(size)
    weights[9, size // 2] = -torch.nan
    return weights


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0)) and one.dtype is other.dtype


@pytest.mark.parametrize("size", [1, 7, 32, 128])
def test_ranges_are_those_of_aminmax(size):
    weights = awkward(40, size)
    for ours, its in zip(ranges(weights), torch.aminmax(weights, dim=-1), strict=True):
        assert equal(ours, its)


@pytest.mark.parametrize("lowest, highest", [(-128, 127), (-8, 7), (-1, 1)])
@pytest.mark.parametrize("zeros", [False, True])
def test_rounding_and_its_slope_are_those_of_tensor_operations(lowest, highest, zeros):
    weights, gradient = awkward(40, 32), torch.randn(40, 32)
    scale = torch.randn(40) / 3
    zero = torch.randint(lowest, highest + 1, (40,)).float() if zeros else torch.zeros(40)
    ratio = weights / scale[:, None]
    numbers = ratio.round() + zero[:, None]
    kept = numbers.clamp(lowest, highest) - zero[:, None]
    inside = (numbers >= lowest) & (numbers <= highest)
    given = weights, scale, zero if zeros else None
    assert equal(rounded(*given, lowest, highest), kept * scale[:, None])
    assert equal(by_scale(*given, gradient, lowest, highest), (kept - ratio * inside) * gradient)


def test_threads_change_nothing_in_a_forked_process_either(monkeypatch):
    weights, scale = awkward(101, 32), torch.rand(101) + 0.1
    before = torch.get_num_threads()
    alone = rounded(weights, scale, None, -8, 7)
    monkeypatch.setattr(group_kernels, "_PART", 64)
    torch.set_num_threads(3)
    try:
        assert equal(rounded(weights, scale, None, -8, 7), alone)
        child = os.fork()
        if not child:  # where the threads of the pool are gone
            os._exit(0 if equal(rounded(weights, scale, None, -8, 7), alone) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)

"""Passes over groups of weights on the CPU, compiled by numba: each reads every weight once and keeps no temporaries.

They give the bits of the tensor operations in `quantizer`: ranges depend on no order, the rest is rounded at the same
places. torch needs about ten times as long for the ranges of groups of 32 weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from strategies.common.compiled import compiled
from strategies.common.float_order import HIGHEST_ORDER, LOWEST_ORDER, order_of_bits
from strategies.common.kernel_threads import in_threads

_compiled = compiled(boundscheck=False, error_model="numpy")
_INFINITY = np.int32(0x7F800000)
_LEAST = np.int32(-0x7F800001)  # minus infinity, as `order_of_bits` has it
_NAN = np.int32(0x7FC00000)
_PART = 1 << 20  # weights that are worth a thread of their own: 0.1 ms of work, where handing it over costs 0.05


def ranges(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and most weight (groups,) of each of (groups, weights) in fp32; NaN where a weight is NaN."""
    found = torch.empty(2, len(groups))
    _in_parts(_least_and_most, groups.view(torch.int32), *found.view(torch.int32))
    return found[0], found[1]


def signed_scales(groups: torch.Tensor, lowest: int) -> torch.Tensor:
    """The scale (groups,) with which the largest weight of each of (groups, weights) in fp32 is the lowest number."""
    least, most = ranges(groups)
    _in_parts(_on_the_lowest, least, most, numbers=(lowest,))
    return least


def rounded(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, lowest: int, highest: int
            ) -> torch.Tensor:
    """scale * (q - zero_point) (groups, weights) of weights in fp32, computed in fp32; a scale for each group."""
    made = torch.empty_like(groups)
    if zero_point is None:
        _in_parts(_symmetric, groups, _vector(scale), made, numbers=(lowest, highest))
    else:
        _in_parts(_asymmetric, groups, _vector(scale), _vector(zero_point), made, numbers=(lowest, highest))
    return made


def by_scale(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, gradient: torch.Tensor,
             lowest: int, highest: int) -> torch.Tensor:
    """d w_hat / d scale times the gradient of w_hat (groups, weights), both in fp32; see `LearnedScale`."""
    made = torch.empty_like(groups)
    if zero_point is None:
        _in_parts(_symmetric_slope, groups, _vector(scale), gradient, made, numbers=(lowest, highest))
    else:
        _in_parts(_asymmetric_slope, groups, _vector(scale), _vector(zero_point), gradient, made,
                  numbers=(lowest, highest))
    return made


def _vector(found: torch.Tensor) -> torch.Tensor:
    """Scales or zero points of groups as a vector in fp32."""
    return found.detach().flatten().float().contiguous()


def _in_parts(kernel: Callable[..., None], *tensors: torch.Tensor, numbers: tuple[int, ...] = ()) -> None:
    """Run a kernel over groups, the first dimension, on as many threads as torch has; results depend on no split.

    Fake tensors are only made, so that a plan sees the same bytes.
    """
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return None
    arrays, bounds = [np.asarray(_Memory(tensor)) for tensor in tensors], tuple(map(np.float32, numbers))
    parts = max(1, min(torch.get_num_threads(), arrays[0].size // _PART, len(arrays[0])))
    if parts == 1:
        return kernel(*arrays, *bounds)
    edges = [len(arrays[0]) * part // parts for part in range(parts + 1)]
    pieces = [[array[begin:end] for array in arrays] for begin, end in zip(edges, edges[1:], strict=False)]
    in_threads(lambda piece: kernel(*piece, *bounds), pieces)
    return None


class _Memory:
    """A tensor's memory for numpy. `Tensor.numpy` would forbid to resize its storage, as FSDP2 does with weights."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        kind = np.dtype(np.int32 if tensor.dtype is torch.int32 else np.float32)
        self.__array_interface__ = {"data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape),
                                    "typestr": kind.str, "version": 3}


@_compiled
def _least_and_most(bits, least, most):
    for group in range(bits.shape[0]):
        low, high = HIGHEST_ORDER, LOWEST_ORDER
        for place in range(bits.shape[1]):
            value = order_of_bits(bits[group, place])
            low, high = min(low, value), max(high, value)
        if low < _LEAST or high > _INFINITY:
            least[group] = most[group] = _NAN
        else:
            least[group], most[group] = order_of_bits(low), order_of_bits(high)


@_compiled
def _on_the_lowest(least, most, lowest):
    for group in range(least.shape[0]):
        largest = most[group] if most[group] > -least[group] else least[group]
        least[group] = largest / lowest


@_compiled
def _symmetric(weights, scale, made, lowest, highest):
    for group in range(weights.shape[0]):
        own = scale[group]
        for place in range(weights.shape[1]):
            number = np.rint(weights[group, place] / own)
            number = lowest if number < lowest else number  # a NaN stays one
            number = highest if number > highest else number
            made[group, place] = number * own


@_compiled
def _asymmetric(weights, scale, zero_point, made, lowest, highest):
    for group in range(weights.shape[0]):
        own, zero = scale[group], zero_point[group]
        for place in range(weights.shape[1]):
            number = np.rint(weights[group, place] / own) + zero
            number = lowest if number < lowest else number
            number = highest if number > highest else number
            made[group, place] = (number - zero) * own


@_compiled
def _symmetric_slope(weights, scale, gradient, made, lowest, highest):
    for group in range(weights.shape[0]):
        own = scale[group]
        for place in range(weights.shape[1]):
            ratio = weights[group, place] / own
            number = np.rint(ratio)
            inside = np.float32(1.0) if (number >= lowest) & (number <= highest) else np.float32(0.0)
            number = lowest if number < lowest else number
            number = highest if number > highest else number
            made[group, place] = (number - ratio * inside) * gradient[group, place]


@_compiled
def _asymmetric_slope(weights, scale, zero_point, gradient, made, lowest, highest):
    for group in range(weights.shape[0]):
        own, zero = scale[group], zero_point[group]
        for place in range(weights.shape[1]):
            ratio = weights[group, place] / own
            number = np.rint(ratio) + zero
            inside = np.float32(1.0) if (number >= lowest) & (number <= highest) else np.float32(0.0)
            number = lowest if number < lowest else number
            number = highest if number > highest else number
            made[group, place] = (number - zero - ratio * inside) * gradient[group, place]

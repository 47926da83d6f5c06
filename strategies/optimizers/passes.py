"""Where compiled passes (`kernels`) take the place of torch's operations, and how they are spread over threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from strategies.common.kernel_threads import in_threads
from strategies.common.planned_device import kind_of
from strategies.common.shards import Layout, local

T = TypeVar("T")
WORTH = 1 << 20
"""Parameters from which on compiled passes pay. A process takes 0.4 s for numba and what it kept on disk, 1.5 s where
it has nothing yet, and with a million parameters a step saves 1 to 2 ms."""
SPAN = 1 << 19
"""Elements that one thread works on at a time, and whose squares are summed alone, however many threads there are."""
GRAIN = 1 << 23
"""Elements for each of two threads, with fewer than which the second saves nothing: torch's own may still spin after
the backward, so that for some milliseconds it is woken where the first one runs."""


class Compiles:
    """An optimizer whose steps of fp32 parts on CPU are compiled passes, if its parameters are many.

    Whether they are is known when it is made, of whole parameters, so that ranks, resumed runs and single parameters
    stepped in the backward come to the same bits.
    """

    compiled: bool

    def compiles(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether all parameters together are `WORTH` it."""
        return sum(_whole_numel(tensor) for group in groups for tensor in group["params"]) >= WORTH

    @contextmanager
    def planned(self, on_cpu: bool) -> Iterator[None]:
        """Within the context a step of fake tensors allocates what one on CPU, or on another device, would."""
        compiled = self.compiled
        self.compiled = compiled and on_cpu
        try:
            yield
        finally:
            self.compiled = compiled


def _whole_numel(tensor: torch.Tensor) -> int:
    return math.prod(getattr(tensor, "ds_shape", tensor.shape))  # under ZeRO 3 DeepSpeed empties parameters


def passable(tensor: torch.Tensor, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether kernels can read a parameter, its gradient and its state as they are: contiguous fp32 in this memory.

    They are given addresses and ask for nothing, and a state that was loaded or converted can be anything.
    """
    gradient, numel = tensor.grad, local(tensor).numel()
    if not (gradient.dtype == tensor.dtype == torch.float32 and kind_of(tensor) == kind_of(gradient) == "cpu"
            and local(gradient).is_contiguous()):
        return False
    return all(one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous()
               and (not name.startswith("exp_avg") or one.numel() == numel)
               for name, one in state.items() if name != "step")


def without_data(tensor: torch.Tensor) -> bool:
    """Whether there is nothing to pass over, as in planning."""
    return isinstance(tensor, FakeTensor)


def number_of(scalar: torch.Tensor) -> float:
    """A number such as that of a step; 1 in planning, when there are none."""
    return 1.0 if isinstance(scalar, FakeTensor) else float(scalar)


def pairs_of(pairs: torch.Tensor) -> list[list[float]]:
    """The numbers of a tensor [n, 2], as `number_of`."""
    return [[1.0, 1.0]] * len(pairs) if isinstance(pairs, FakeTensor) else pairs.tolist()


def is_one_span(length: int) -> bool:
    """Whether one thread works on all of so many elements."""
    return length <= SPAN


def is_together(layout: Layout) -> bool:
    """Whether all pieces are whole parameters of one span each."""
    return layout.group is None and all(is_one_span(piece.numel) for piece in layout.pieces)


def spans(length: int) -> list[tuple[int, int]]:
    """(begin, number) of `SPAN` elements each, the last ones fewer; one that is empty if there are no elements."""
    return [(begin, min(SPAN, length - begin)) for begin in range(0, max(1, length), SPAN)]


class RowSpan(NamedTuple):
    """Whole matrices of [L, R, C], or rows of one."""

    matrices: slice
    rows: slice


def row_spans(stack: int, rows: int, columns: int, most: int) -> list[RowSpan]:
    """Spans of [L, R, C], each of at most `most` elements, or of one row."""
    if rows * columns <= most:
        count = most // max(1, rows * columns)
        return [RowSpan(slice(at, min(at + count, stack)), slice(0, rows)) for at in range(0, stack, count)]
    height = max(1, most // columns)
    return [RowSpan(slice(matrix, matrix + 1), slice(at, min(at + height, rows)))
            for matrix in range(stack) for at in range(0, rows, height)]


def shares(sizes: np.ndarray[Any, Any]) -> list[slice]:
    """Runs of items of about equal size in all, one for each of torch's threads; those that would be empty left out."""
    threads = torch.get_num_threads()
    edges = np.searchsorted(np.cumsum(sizes), np.arange(1, threads) * (sizes.sum() / threads))
    cuts = [0, *(int(edge) + 1 for edge in edges), len(sizes)]
    return [slice(begin, end) for begin, end in pairwise(sorted(min(cut, len(sizes)) for cut in cuts)) if begin < end]


def spread(work: Callable[[slice], Any], sizes: np.ndarray[Any, Any]) -> None:
    """`work` of runs of items, in as many threads as torch has; a kernel leaves the interpreter to the others."""
    if torch.get_num_threads() == 1 or sizes.sum() < 2 * GRAIN:
        work(slice(0, len(sizes)))
        return
    in_threads(work, shares(sizes))

"""Whether a step is being planned for a GPU that is not there, so that what depends on the device takes the GPU's way.

A plan from shapes runs fake tensors. Those of a GPU need a GPU's build of torch, so that elsewhere they are the CPU's,
and code that asks a tensor for its device would take the CPU's kernels, tiles and buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_for_gpu = False


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Within the context, tensors without data stand for a GPU's."""
    global _for_gpu
    before, _for_gpu = _for_gpu, True
    try:
        yield
    finally:
        _for_gpu = before


def stands_for_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU, or is planned to be."""
    return tensor.is_cuda or _for_gpu


def kind_of(tensor: torch.Tensor) -> str:
    """Type of the device that a tensor is on, or is planned to be on."""
    return "cuda" if stands_for_gpu(tensor) else tensor.device.type

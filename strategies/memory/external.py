"""What a GPU holds beside the tensors that a plan knows of: workspaces of libraries, and whatever else is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from strategies.memory.meter import CUDA_BLOCK
from strategies.memory.tracker import LiveBytes


def held_besides(device: torch.device, known: Iterable[Any]) -> int:
    """Bytes allocated on a GPU by none of the known modules, optimizers and tensors.

    cuBLAS takes a workspace for each thread that multiplies matrices, from torch's allocator and for good; autograd has
    a thread of its own. Both are made to exist first.
    """
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.linear(weight, weight, weight[0]).sum().backward()
    del weight
    return unknown_bytes(torch.cuda.memory_allocated(device), known, "cuda")


def unknown_bytes(allocated: int, known: Iterable[Any], kind: str | None = None) -> int:
    """Bytes allocated that are none of the known tensors', of one kind of device or any, as the allocator rounds."""
    counted = LiveBytes(round_to=CUDA_BLOCK, device=kind)
    counted.watch(*known)
    return max(0, allocated - counted.current)

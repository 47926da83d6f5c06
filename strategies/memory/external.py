"""GPU memory in use besides the tensors that a memory plan knows of, such as library workspaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from strategies.memory.meter import CUDA_BLOCK
from strategies.memory.tracker import LiveBytes


def held_besides(device: torch.device, known: Iterable[Any]) -> int:
    """Bytes allocated on a GPU that do not belong to the known modules, optimizers and tensors.

    For each thread that multiplies matrices, cuBLAS allocates a permanent workspace from torch's allocator, and
    autograd has its own thread. Both workspaces are created before measuring.
    """
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.linear(weight, weight, weight[0]).sum().backward()
    del weight
    return unknown_bytes(torch.cuda.memory_allocated(device), known, "cuda")


def unknown_bytes(allocated: int, known: Iterable[Any], kind: str | None = None) -> int:
    """`allocated` bytes less those of known tensors, rounded like the allocator's; `kind` limits the type of device."""
    counted = LiveBytes(round_to=CUDA_BLOCK, device=kind)
    counted.watch(*known)
    return max(0, allocated - counted.current)

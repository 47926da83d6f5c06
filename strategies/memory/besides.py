"""What a GPU holds beside the tensors that a plan knows of: workspaces of libraries, and whatever else is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from strategies.memory.tracker import strided_parts, tensors_of

ROUNDED = 512  # bytes to whose multiple the CUDA caching allocator rounds up


def held_besides(device: torch.device, known: Iterable[Any]) -> int:
    """Bytes allocated on a GPU by none of the known modules, optimizers and tensors.

    cuBLAS takes a workspace for each thread that multiplies matrices, from torch's allocator and for good; autograd has
    a thread of its own. Both are made to exist first.
    """
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.linear(weight, weight, weight[0]).sum().backward()
    del weight
    return unknown_bytes(torch.cuda.memory_allocated(device), [
        tensor for tensor in tensors_of(*known) if tensor.device.type == "cuda"])


def unknown_bytes(allocated: int, tensors: Iterable[torch.Tensor]) -> int:
    """Bytes allocated that are none of the tensors', each storage counted once and as the allocator rounds it."""
    sizes = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for tensor in tensors
             for part in strided_parts(tensor)}
    return max(0, allocated - sum(-(-size // ROUNDED) * ROUNDED for size in sizes.values()))

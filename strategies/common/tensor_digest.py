"""SHA-256 of a tensor, in parts if its elements are on several ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

PART = 2**24  # elements that are hashed at a time


def tensor_digest(like: torch.Tensor, parts: Iterable[torch.Tensor]) -> str:
    """SHA-256 of a tensor's dtype, shape and elements in row-major order.

    Args:
        like: gives dtype and shape.
        parts: the elements, in consecutive parts.
    """
    digest = hashlib.sha256(f"{like.dtype} {tuple(like.shape)} ".encode())
    for part in parts:
        for piece in part.split(PART) if part.numel() else ():
            digest.update(piece.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

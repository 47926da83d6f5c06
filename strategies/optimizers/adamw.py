"""AdamW from torch, fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def adamw(groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) in torch's fused kernel.

    It works element by element: right as it is on a rank's part of parameters, a DTensor or a flat tensor of ZeRO.

    Args:
        groups: as `parameter_groups` makes them, each with its "weight_decay".
    """
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

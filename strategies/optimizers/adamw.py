"""torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def adamw(groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with torch's fused kernel.

    It is elementwise, so it is correct unchanged on a rank's part of the parameters, whether a DTensor or a flat tensor
    of ZeRO.

    Args:
        groups: from `parameter_groups`, each with its "weight_decay".
    """
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

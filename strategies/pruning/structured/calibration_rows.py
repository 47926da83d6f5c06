"""Calibration rows of a cut: what of them a model is given, and which tokens count."""

from __future__ import annotations

from typing import Any

import torch

from strategies.common.blockwise_calibration import Batch, token_mask

BESIDES = ("labels", "targets", "counted")  # what rows may have besides inputs of a model
COMPARED, TOKENS = 4, 64  # most rows, and tokens of each, that two models are compared on


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a model in a batch."""
    return {name: value for name, value in batch.items() if name not in BESIDES}


def counted(batch: Batch) -> torch.Tensor | None:
    """(rows * tokens,) True for the tokens that count: by `counted`, else by `attention_mask`; None for all."""
    mask = batch.get("counted")
    return token_mask(batch) if mask is None else mask.flatten().bool()


def only_counted(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows (tokens, ...) without those that do not count; all of them where they are no tokens."""
    return rows if mask is None or len(mask) != len(rows) else rows[mask.to(rows.device)]


def compared(batch: Batch) -> Batch:
    """The first rows of a batch, and their first tokens."""
    ids = batch.get("input_ids")
    length = 0 if ids is None else ids.shape[1]

    def first(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        rows = value[:COMPARED]
        return rows[:, :TOKENS] if length and rows.ndim > 1 and rows.shape[1] == length else rows

    return {name: first(value) for name, value in batch.items()}

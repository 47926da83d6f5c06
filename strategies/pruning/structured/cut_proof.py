"""Makes the smaller model, and proves it by the logits of the whole one with the other units zeroed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from strategies.common.blockwise_calibration import Batch
from strategies.pruning.structured.calibration_rows import counted, inputs_of
from strategies.pruning.structured.config_steps import Step
from strategies.pruning.structured.double_precision import DoublePrecision, doubled
from strategies.pruning.structured.slicing import (
    Kept,
    empty_model,
    experts_left_out,
    move_weights,
    norms_over_kept,
    set_to_zero,
)
from strategies.pruning.structured.unit_scores import experts_in_turn
from strategies.pruning.structured.unit_spaces import Space


def cut_and_compare(model: nn.Module, step: Step, spaces: Sequence[Space], kept: Kept, batch: Batch
                    ) -> tuple[nn.Module, float]:
    """The smaller model, and how far its logits are from those of the whole one with the other units zeroed.

    The weights of the whole model move to the smaller one.
    """
    smaller = empty_model(model, step.config)
    if step.kind == "experts":
        expected = logits(model, batch, partial(experts_left_out, model, spaces, kept))
    else:
        set_to_zero(model, spaces, kept)
        expected = logits(model, batch, partial(norms_over_kept, model, smaller, spaces, kept))
    move_weights(model, smaller, spaces, kept)
    return smaller, difference(expected, logits(smaller, batch))


@torch.no_grad()
def logits(model: nn.Module, batch: Batch, context: Callable[[], AbstractContextManager] = nullcontext) -> torch.Tensor:
    """Logits of the tokens, rows or classes that count, with the model within a context.

    They are computed in float64, or in fp32 where operations of the model cannot be.
    """
    try:
        with DoublePrecision(), experts_in_turn(model), context():
            found = model(**doubled(inputs_of(batch))).logits
    except (RuntimeError, NotImplementedError):  # an operation without float64, or without the memory for it
        with experts_in_turn(model), context():
            found = model(**inputs_of(batch)).logits.float()
    mask = counted(batch)
    if mask is not None and found.ndim == 3 and found.shape[:2].numel() == len(mask):
        return found.flatten(0, 1)[mask]
    return found


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))

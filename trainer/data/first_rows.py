"""The first rows of a run, for what is measured on them before or after training."""

from __future__ import annotations

from itertools import islice

import torch

from trainer.data.dataset import PreparedData
from trainer.data.rows import StreamedRows

COUNTS = ("bytes", "length", "row")  # what a row has besides the inputs of a model and its targets


def first_rows(text: PreparedData, count: int, seed: int, also: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The first `count` training rows, or all there are, in the order of the run's seed; each tensor (rows, ...).

    Args:
        also: which of `COUNTS` are given as well.
    """
    if isinstance(text.train, StreamedRows):
        chosen = list(islice(text.train.rows(), count))
    else:
        order = text.train.order(seed)
        chosen = [text.train[order[number]] for number in range(min(count, len(text.train)))]
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]
            if name not in COUNTS or name in also}

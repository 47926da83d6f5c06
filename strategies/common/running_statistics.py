"""The running statistics of a model's batch norms: undone with a skipped step, and the same on all ranks.

In training a batch norm normalizes by the statistics of its micro-batch, and moves its running mean and variance
towards them (Ioffe and Szegedy 2015); in evaluation it uses the running ones. They are buffers that a forward changes,
so no engine or optimizer takes care of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model that have running statistics, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None}


class RunningStatistics:
    """The running statistics of a model that trains.

    Args:
        model: without wrappers; a model without batch norms has none, and nothing is done.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for norm in batch_norms(model).values() for buffer in norm.buffers()]
        self._kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember them as they are, before the forwards of a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Set them back to what `keep` remembered, when a step is skipped: its activations may not be finite."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)

    def average(self, total: Callable[[torch.Tensor], torch.Tensor], ranks: int) -> None:
        """Replace them on each rank by their mean over ranks, each of which has seen other rows. A collective call.

        They are linear in the statistics of the micro-batches, so the mean is that of all ranks' micro-batches, however
        often it is taken.

        Args:
            total: sums a tensor over ranks.
            ranks: number of ranks.
        """
        own = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        if ranks == 1 or not own:
            return
        mean = total(torch.cat([buffer.flatten().float() for buffer in own])) / ranks
        for buffer, part in zip(own, mean.split([buffer.numel() for buffer in own]), strict=True):
            buffer.copy_(part.view_as(buffer))

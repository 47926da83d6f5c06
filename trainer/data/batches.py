"""Batches in an order that depends on (seed, epoch, global position) and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data.rows import PackedRows, StreamedRows

Batch = dict[str, torch.Tensor]


class Order:
    """The row at every global position of an endless run: epoch after epoch, each a permutation of all rows."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # a batch spans two epochs at most unless rows are very few
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._permutations[epoch][offset])


class _MicroBatches(Sampler):
    """Row indices of one replica's micro-batches from a global position on, for ever.

    Micro-batch number m of the whole run holds positions m b to (m + 1) b; replica r of W takes m = r modulo W. From
    the end of the run on there is no row, -1, in a place.
    """

    def __init__(self, order: Order, micro_batch: int, replica: int, replicas: int, skip: int, end: int | None):
        self.order, self.micro_batch, self.end = order, micro_batch, end
        self.first, self.stride = skip // micro_batch + replica, replicas

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first
        while True:
            begin = number * self.micro_batch
            yield [self.order[position] if self.end is None or position < self.end else -1
                   for position in range(begin, begin + self.micro_batch)]
            number += self.stride


def training_batches(rows: PackedRows | StreamedRows, *, seed: int, micro_batch: int, replica: int, replicas: int,
                     skip: int, workers: int, pin: bool, end: int | None = None) -> Iterator[Batch]:
    """This process's micro-batches, after the first `skip` rows of the run.

    A run that has an `end` has so many rows; a batch in which it lies is filled up with rows of padding, number -1.
    Each holds `input_ids`, `position_ids`, `targets` (micro_batch, sequence), `bytes`, `length`, `row` (micro_batch,).
    """
    if isinstance(rows, StreamedRows):
        # Inside a worker process `datasets` deals a stream's files out and shuffles them otherwise than in this one.
        workers = 0
    # A generator of its own: the loader would draw from the global one, and a resumed run would drop out otherwise.
    options = {"num_workers": workers, "pin_memory": pin, "persistent_workers": workers > 0,
               "generator": torch.Generator()}
    if isinstance(rows, StreamedRows):
        return iter(DataLoader(rows.share(micro_batch, replica, replicas, skip), batch_size=None, **options))
    sampler = _MicroBatches(Order(len(rows), seed), micro_batch, replica, replicas, skip, end)
    return iter(DataLoader(rows, batch_sampler=sampler, **options))


def with_learned(batch: Batch) -> Batch:
    """A batch with `learned`, the flat positions that have a target: found where it lies, so that no device waits."""
    return {**batch, "learned": torch.argwhere(batch["targets"].flatten() != IGNORED)[:, 0]}


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model is given of a batch: positions restart with every packed document and keep them apart."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def real_tokens(batch: Batch) -> torch.Tensor | None:
    """(rows, sequence) which tokens are no padding, which is at the end; None where that is not known."""
    if "length" not in batch:
        return None
    return torch.arange(batch["input_ids"].shape[1], device=batch["length"].device) < batch["length"][:, None]

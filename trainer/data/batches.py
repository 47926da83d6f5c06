"""Training batches, in an order that depends only on seed, epoch and global position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data.mixture import Rows
from trainer.data.row_order import MixedOrder, Order
from trainer.data.rows import StreamedRows
from trainer.experiment.data_nodes import Data

Batch = dict[str, torch.Tensor]


class _MicroBatches(Sampler):
    """Endless sampler of row indices for one data-parallel replica's micro-batches, from a global position on.

    With micro-batches of b rows, the m-th micro-batch after the first `skip` positions covers positions skip + m b to
    skip + (m + 1) b - 1, and replica r of W takes those with m = r modulo W. Positions from `end` on get the order's
    filler: -1, a row of padding, or another negative number.
    """

    def __init__(self, order: Order | MixedOrder, micro_batch: int, replica: int, replicas: int, skip: int,
                 end: int | None):
        self.order, self.micro_batch, self.end = order, micro_batch, end
        self.first, self.stride = skip + replica * micro_batch, replicas * micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.first
        while True:
            yield [self.order[position] if self.end is None or position < self.end else self.order.filler(position)
                   for position in range(begin, begin + self.micro_batch)]
            begin += self.stride


def training_batches(rows: Rows, *, seed: int, micro_batch: int, replica: int, replicas: int, skip: int, workers: int,
                     pin: bool, end: int | None = None) -> Iterator[Batch]:
    """Iterate over this replica's micro-batches, after the first `skip` rows of the run.

    Each micro-batch has `input_ids`, `position_ids` and `targets`, of shape (micro_batch, sequence), and `bytes`,
    `length` and `row`, of shape (micro_batch,).

    Args:
        rows: the training rows.
        seed: seed of the order.
        micro_batch: rows per micro-batch.
        replica: which data-parallel replica this process belongs to.
        replicas: number of data-parallel replicas.
        skip: rows of the run that were trained on before; for a stream a multiple of the micro-batch times the
            replicas.
        workers: data-loader processes; a stream uses none.
        pin: whether to return tensors in pinned memory.
        end: number of rows in the run; a batch that reaches beyond it is filled with rows of padding, whose `row` is
            -1. None is endless.
    """
    if isinstance(rows, StreamedRows):
        # In worker processes `datasets` splits a stream's files among them and shuffles differently than it does here.
        workers = 0
    # With the global generator, the loader would draw from it, and dropout in a resumed run would differ.
    options = {"num_workers": workers, "pin_memory": pin, "persistent_workers": workers > 0,
               "generator": torch.Generator()}
    if isinstance(rows, StreamedRows):
        return iter(DataLoader(rows.share(micro_batch, replica, replicas, skip), batch_size=None, **options))
    sampler = _MicroBatches(rows.order(seed), micro_batch, replica, replicas, skip, end)
    return iter(DataLoader(rows, batch_sampler=sampler, **options))


def with_learned(batch: Batch) -> Batch:
    """Add `learned`, the flat positions that have a target; computed on the host, so that no device has to sync."""
    return {**batch, "learned": torch.argwhere(batch["targets"].flatten() != IGNORED)[:, 0]}


ENCODED = ("input_ids", "attention_mask", "token_type_ids")  # what a classifier of texts is given, where it is there


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments for a model's forward, by what the batch holds: images, padded texts, or packed ones.

    Positions of packed texts restart at each document, which keeps them apart.
    """
    if "pixel_values" in batch:
        return {"pixel_values": batch["pixel_values"]}
    if "attention_mask" in batch:
        return {name: batch[name] for name in ENCODED if name in batch}
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def example_batch(data: Data, rows: int, device: torch.device | str = "cpu") -> Batch:
    """A micro-batch shaped like those of training, with a target everywhere; packed rows hold two documents."""
    length = data.sequence_length
    if data.task == "image_classification":
        size = data.images.size
        return {"pixel_values": torch.zeros(rows, data.images.channels, size, size, device=device),
                "targets": torch.zeros(rows, dtype=torch.long, device=device)}
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    if not data.is_language:
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                 "targets": ids.clone() if data.task == "token_classification" else ids[:, 0].clone()}
        return {**found, "token_type_ids": ids.clone()} if data.text_pair else found
    positions = torch.arange(length, device=device)
    if data.packing and length > 1:
        positions = torch.where(positions < length // 2, positions, positions - length // 2)
    return {"input_ids": ids, "position_ids": positions.repeat(rows, 1), "targets": ids.clone()}


def positions_of(data: Data, rows: int) -> int:
    """Positions of a micro-batch that have a target at most."""
    return rows * (data.sequence_length if data.task in ("causal_lm", "token_classification") else 1)


def real_tokens(batch: Batch) -> torch.Tensor | None:
    """(rows, sequence) mask of the tokens before the padding at the end; None for a batch without `length`."""
    if "length" not in batch or "position_ids" not in batch:
        return None
    return torch.arange(batch["input_ids"].shape[1], device=batch["length"].device) < batch["length"][:, None]

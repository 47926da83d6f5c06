"""Mixtures of several sources, whose rows follow each other so that each source has its share of the tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.data.row_order import MixedOrder
from trainer.data.rows import PackedRows, Row, StreamedRows
from trainer.experiment.data_nodes import of_source


@dataclass(frozen=True)
class Ingredient:
    """What a run takes of one source of a mixture.

    Attributes:
        name: the source's name.
        weight: its share of the tokens, as configured; the shares of a mixture sum to 1.
        rows: rows that it has; None for a stream, as of what follows.
        tokens: tokens that it has, without padding.
        learned: targets among them.
        trained: its tokens in the whole run, each as often as it is trained on.
        share: its share of the tokens in the whole run.
    """

    name: str
    weight: float
    rows: int | None = None
    tokens: int | None = None
    learned: int | None = None
    trained: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        if not self.tokens or not self.trained:
            return f"{self.name} {self.weight:.1%}"
        return f"{self.name} {self.share:.1%} ({self.tokens:,} tokens, seen {self.trained / self.tokens:.2g} times)"


class MixedRows(Dataset):
    """Map-style dataset of the packed rows of several sources, one source after the other.

    Args:
        parts: the rows of each source.
        shares: the share of tokens of each source; they sum to 1.
    """

    def __init__(self, parts: Sequence[PackedRows], shares: Sequence[float]):
        self.parts, self.shares = list(parts), list(shares)
        self.begins = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getitem__(self, index: int) -> Row:
        """The row at `index`; -1 gives a row of padding without targets."""
        if index < 0:
            return self.parts[0][index]
        part = int(np.searchsorted(self.begins, index, side="right")) - 1
        return {**self.parts[part][index - int(self.begins[part])], "row": torch.tensor(index)}

    def order(self, seed: int) -> MixedOrder:
        """The order in which a run with this seed takes the rows."""
        return MixedOrder([part.lengths for part in self.parts], self.shares, seed)

    def token_counts(self, size: int) -> np.ndarray:
        """(size or more,) how often each token is in the data."""
        counts = [part.token_counts(size) for part in self.parts]
        whole = np.zeros(max(map(len, counts)), np.int64)
        for one in counts:
            whole[:len(one)] += one
        return whole

    def ingredients(self, names: Sequence[str], rows: int, seed: int) -> list[Ingredient]:
        """What a run takes of each source.

        Args:
            names: the names of the sources.
            rows: rows that the run trains on, each as often as it does.
            seed: seed of the order.
        """
        trained = self.order(seed).tokens_before(rows)
        return [Ingredient(name, share, len(part), part.tokens, part.learned, own, own / max(1, sum(trained)))
                for name, share, part, own in zip(names, self.shares, self.parts, trained, strict=True)]


class MixedStreams(StreamedRows):
    """Endless dataset of rows of several streams, in the order by tokens that `MixedOrder` has.

    Each stream goes through its own epochs. As with a single stream, every process reads all of them from the start, so
    that row n is the same for any number of processes and after a restart.
    """

    def __init__(self, parts: Sequence[StreamedRows], shares: Sequence[float]):
        self.parts, self.shares = list(parts), list(shares)
        self.micro_batch, self.replica, self.replicas, self.skip = 1, 0, 1, 0

    def rows(self) -> Iterator[Row]:
        """All rows in order, without end."""
        placed = [_placed(part.rows(), share, source)
                  for source, (part, share) in enumerate(zip(self.parts, self.shares, strict=True))]
        for number, (_, _, row) in enumerate(heapq.merge(*placed, key=lambda one: one[:2])):
            yield {**row, "row": torch.tensor(number)}


def _placed(rows: Iterator[Row], share: float, source: int) -> Iterator[tuple[float, int, Row]]:
    """Rows of one source, each after its place in the order of a mixture; see `MixedOrder`."""
    before = 0
    with of_source(source):
        for row in rows:
            length = int(row["length"])
            yield (before + length / 2) / share, source, row
            before += length


Rows = PackedRows | MixedRows | StreamedRows

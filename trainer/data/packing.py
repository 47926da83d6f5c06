"""From documents to rows of a fixed length: several documents in a row, none of which sees another.

Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): documents are cut only when
they are longer than a row, then each goes into the row with the least room that still holds it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

import numpy as np
import torch

from strategies.distillation.losses.response import IGNORED
from trainer.data.encoding import Document

WINDOW = 2048  # pieces packed together: more waste less room, fewer hold less in memory when streaming


Packed = TypeVar("Packed", bound=Sized)


def cuts(loss_mask: np.ndarray, capacity: int, plain: bool) -> Iterator[slice]:
    """Cut a document into pieces of at most `capacity` tokens that each teach something.

    Args:
        learned: (n,) which tokens are learned.
        capacity: tokens in a row.
        plain: plain text is used to its end; a record with a prompt keeps its first piece only, since an answer cut
            off from its question teaches to answer without one.
    """
    for start in range(0, len(loss_mask) if plain else min(len(loss_mask), capacity), capacity):
        piece = slice(start, min(start + capacity, len(loss_mask)))
        if loss_mask[piece][1:].any():  # a piece's first token has nothing before it to be predicted from
            yield piece


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows whose sum is at most `capacity`, longest first into the tightest row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def pack(pieces: Iterable[Packed], capacity: int, packing: bool) -> Iterator[list[Packed]]:
    """Rows of pieces, window by window in the order the documents come; one piece a row without packing."""
    window: list[Packed] = []
    number = 0
    for piece in pieces:
        window.append(piece)
        if len(window) == (WINDOW if packing else 1):
            yield from _pack_window(window, capacity, number)
            window, number = [], number + 1
    yield from _pack_window(window, capacity, number)


def _pack_window(window: list[Packed], capacity: int, number: int) -> Iterator[list[Packed]]:
    rows = best_fit([len(piece) for piece in window], capacity)
    for row in np.random.default_rng(number).permutation(len(rows)):  # best fit leaves long documents first
        yield [window[index] for index in rows[row]]


def build_row(parts: Sequence[Document], capacity: int, padding: int) -> dict[str, torch.Tensor]:
    """A row of `capacity` tokens from the documents packed into it.

    Returns:
        input_ids: (capacity,) tokens, padded at the end.
        position_ids: (capacity,) restarting at 0 with every document; models keep documents apart by it.
        targets: (capacity,) the next token of the same document where it is learned, else `IGNORED`.
        bytes: () UTF-8 bytes of text that the targets stand for.
        length: () tokens before the padding.
    """
    tokens = np.full(capacity, padding, np.int64)
    positions = np.zeros(capacity, np.int64)
    targets = np.full(capacity, IGNORED, np.int64)
    at = size = 0
    for part in parts:
        end = at + len(part.tokens)
        tokens[at:end] = part.tokens
        positions[at:end] = np.arange(end - at)
        targets[at:end - 1] = np.where(part.loss_mask[1:], part.tokens[1:], IGNORED)
        size += int(part.bytes[1:][part.loss_mask[1:]].sum())
        at = end
    # Padding is read as documents no longer than those of the row: some models read all by the largest position.
    positions[at:] = np.arange(capacity - at) % max((len(part.tokens) for part in parts), default=capacity)
    return {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets), "bytes": torch.tensor(size), "length": torch.tensor(at)}

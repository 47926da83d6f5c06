"""Sequence packing: several documents per fixed-length row, each masked from the others.

Uses best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): documents are cut only if
they are longer than a row, and each piece then goes into the row with the least free space that still fits it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

import numpy as np
import torch

from strategies.distillation.losses.response import IGNORED
from trainer.data.encoding import Document

WINDOW = 2048  # pieces packed at a time: more leave less padding, fewer take less memory when streaming


Packed = TypeVar("Packed", bound=Sized)


def cuts(loss_mask: np.ndarray, capacity: int, plain: bool) -> Iterator[slice]:
    """Cut a document into pieces of at most `capacity` tokens, and yield those that have at least one target.

    Args:
        loss_mask: (n,) which tokens the loss covers.
        capacity: tokens in a row.
        plain: plain text is used to its end; of a record with a prompt only the first piece is kept, since an answer
            cut off from its question would teach the model to answer without one.
    """
    for start in range(0, len(loss_mask) if plain else min(len(loss_mask), capacity), capacity):
        piece = slice(start, min(start + capacity, len(loss_mask)))
        if loss_mask[piece][1:].any():  # a piece's first token is no target: it has no context to be predicted from
            yield piece


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices of `lengths` into rows with a sum of at most `capacity`, by best-fit decreasing."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, row), sorted
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
    """Pack pieces into rows, one window of consecutive pieces at a time; without packing, one piece per row."""
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
    for row in np.random.default_rng(number).permutation(len(rows)):  # else rows with long documents come first
        yield [window[index] for index in rows[row]]


def build_row(parts: Sequence[Document], capacity: int, padding: int) -> dict[str, torch.Tensor]:
    """Build a row of `capacity` tokens from the documents packed into it.

    Returns:
        input_ids: (capacity,) tokens, padded at the end.
        position_ids: (capacity,) positions, restarting at 0 at every document; models mask documents by them.
        targets: (capacity,) the next token of the same document where the loss covers it, else `IGNORED`.
        bytes: () number of UTF-8 bytes of text in the targets.
        length: () number of tokens before the padding.
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
    # Padding gets positions like documents no longer than those in the row: some models (for example with RoPE scaled
    # by length) treat all tokens by the largest position.
    positions[at:] = np.arange(capacity - at) % max((len(part.tokens) for part in parts), default=capacity)
    return {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets), "bytes": torch.tensor(size), "length": torch.tensor(at)}

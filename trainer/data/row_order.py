"""The order of training rows: a function of seed and global position alone, for one source and for mixtures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 4096  # rows of a mixture, about, that are put in order at a time


class Order:
    """Maps each global position of an endless run to a row: every epoch is its own permutation of all rows."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # a batch spans at most two epochs, unless there are very few rows
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._permutations[epoch][offset])

    def filler(self, position: int) -> int:
        """What stands for a position behind the last row of a run: -1, a row of padding."""
        return -1


class MixedOrder:
    """Maps each global position of an endless run to a row of a mixture, whose sources have fixed shares of the tokens.

    A source is passed over again and again, each time in another permutation. Each of its rows has a place: the tokens
    of the source up to the row's middle, divided by the source's share. Rows of all sources follow each other by place.
    So in each beginning of the order, V tokens long, a source of share w has w V tokens, up to a row of each source; a
    small source is repeated, and of a large one each row is seen equally often, up to once. Nothing has to be replayed
    to find a position: a pass always has the same tokens, so that it is known where each pass begins.

    Args:
        lengths: for each source, (rows,) the tokens of its rows.
        shares: the share of tokens of each source; they sum to 1.
        seed: seed of the permutations.
    """

    def __init__(self, lengths: Sequence[np.ndarray], shares: Sequence[float], seed: int):
        self._passes = [_Passes(own, share, [seed, number])
                        for number, (own, share) in enumerate(zip(lengths, shares, strict=True))]
        self._begins = np.cumsum([0, *map(len, lengths)])[:-1]
        self._per_token = sum(len(own.lengths) * own.share / own.tokens for own in self._passes)  # rows
        self._firsts: dict[int, int] = {}
        self._windows: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> int:
        begin, rows = self._window(self._window_of(position))
        return int(rows[position - begin])

    def filler(self, position: int) -> int:
        """What stands for a position behind the last row of a run: -1, a row of padding."""
        return -1

    def tokens_before(self, position: int) -> list[int]:
        """Tokens that each source has before a position."""
        window = self._window_of(position)
        begin, rows = self._window(window)
        source = np.searchsorted(self._begins, rows[:position - begin], side="right") - 1
        inside = np.bincount(source, minlength=len(self._passes)).tolist()
        return [own.tokens_of(own.before(self._place(window)) + more)
                for own, more in zip(self._passes, inside, strict=True)]

    def _place(self, window: int) -> float:
        """The place at which a window begins."""
        return window * WINDOW / self._per_token

    def _first(self, window: int) -> int:
        """The position at which a window begins."""
        if window not in self._firsts:
            self._firsts[window] = sum(own.before(self._place(window)) for own in self._passes)
        return self._firsts[window]

    def _window_of(self, position: int) -> int:
        window = position // WINDOW
        while self._first(window) > position:
            window -= 1
        while self._first(window + 1) <= position:
            window += 1
        return window

    def _window(self, window: int) -> tuple[int, np.ndarray]:
        """The first position of a window, and its rows in order."""
        if window not in self._windows:
            if len(self._windows) > 1:
                del self._windows[min(self._windows)]
            ends = self._place(window), self._place(window + 1)
            found = [own.between(*ends) for own in self._passes]
            places = np.concatenate([places for _, places in found])
            rows = np.concatenate([begin + rows for begin, (rows, _) in zip(self._begins, found, strict=True)])
            # Stable, so that of rows at the same place those of the first source come first.
            self._windows[window] = self._first(window), rows[np.argsort(places, kind="stable")]
        return self._windows[window]


class _Passes:
    """The endless passes over the rows of one source of a mixture."""

    def __init__(self, lengths: np.ndarray, share: float, seed: list[int]):
        self.lengths, self.share, self.seed = lengths, share, seed
        self.tokens = int(lengths.sum())
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def before(self, place: float) -> int:
        """How many rows of all passes come before a place."""
        number = int(place * self.share // self.tokens)
        return number * len(self.lengths) + int(np.searchsorted(self._pass(number)[1], place))

    def between(self, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """The rows from one place to another, and their places."""
        first, last = self.before(begin), self.before(end)
        size, rows, places = len(self.lengths), [], []
        for number in range(first // size, -(-last // size)):
            part = slice(max(0, first - number * size), last - number * size)
            rows.append(self._pass(number)[0][part])
            places.append(self._pass(number)[1][part])
        return (np.concatenate(rows), np.concatenate(places)) if rows else (np.zeros(0, np.int64), np.zeros(0))

    def tokens_of(self, rows: int) -> int:
        """Tokens of the first `rows` rows of all passes."""
        number, rest = divmod(rows, len(self.lengths))
        return number * self.tokens + int(self.lengths[self._pass(number)[0][:rest]].sum())

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) the permutation of a pass, and (rows,) the places of its rows."""
        if number not in self._known:
            if len(self._known) > 1:
                del self._known[min(self._known)]
            permutation = np.random.default_rng([*self.seed, number]).permutation(len(self.lengths))
            lengths = self.lengths[permutation]
            self._known[number] = permutation, (number * self.tokens + np.cumsum(lengths) - lengths / 2) / self.share
        return self._known[number]

"""Annealing in rounds, by time or by moves, from orders and toward the cheapest that fits or the least peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from strategies.rematerialization.solve.annealing import anneal
from strategies.rematerialization.solve.annealing_moves import Arrays, nothing_known
from strategies.rematerialization.solve.graph import Graph, simulate

ROOM = 8  # an order holds at most this many runs per operation on average
BURST = 0.03  # seconds of annealing between two looks at the clock
COOLING = 1e-3  # last temperature over first
DEAREST = 100  # highest price of a byte over first; a higher one would freeze the search at low excess


def arrays(graph: Graph) -> Arrays:
    """The graph as the arrays compiled code works on; reads are without repeats."""
    reads = [tuple(sorted(set(read))) for read in graph.reads]
    users: list[list[int]] = [[] for _ in graph.maker]
    for operation, read in enumerate(reads):
        for value in read:
            users[value].append(operation)
    maker, size = np.asarray(graph.maker, np.int64), np.asarray(graph.size, np.int64)
    once, held = np.zeros(len(graph.seconds), np.uint8), np.zeros(len(maker), np.uint8)
    once[list(graph.once)] = 1
    held[list(graph.held)] = 1
    movable = ((once[maker] == 0) & (held == 0) & (size > 0)).astype(np.uint8)
    return Arrays(np.asarray(graph.seconds, np.float64), *_rows(reads), *_rows(graph.makes), *_rows(users), maker, size,
                  np.asarray(graph.workspace, np.int64), once, held, movable, int(graph.fixed))


def _rows(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return start, np.array([item for row in lists for item in row], np.int64)


class Searcher:
    """Annealing toward the cheapest order that fits `budget`, or, if `least`, toward the least peak.

    Attributes:
        order: the best order so far, None if nothing fits yet.
        figure: its cost of reruns, or its peak if `least`; infinite if nothing fits yet.
    """

    def __init__(self, graph: Graph, budget: int, seed: int = 0, least: bool = False):
        self.graph, self.budget, self.seed, self.least = graph, budget, seed, least
        self.arrays = arrays(graph)
        self.operations = len(graph.seconds)
        self.room = ROOM * self.operations + 64
        self.state = np.array([(seed + 1) * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
        self.once = float(np.sum(graph.seconds))
        self.hot = 3 * max(self.once, 1e-30) / self.operations
        self.price = max(self.once, 1e-30) / max(1.0, float(self.arrays.size.sum()))
        self.highest = DEAREST * self.price
        self.figure, self.order = np.inf, None
        self.known: dict[tuple[int, ...], tuple[float, int]] = {}  # orders offered: cost and peak
        self.rate = 1e5  # moves a second, measured as it goes

    def offer(self, order: Sequence[int]) -> float:
        """Take `order` for the best if it is; returns its cost with overshoot at the present price."""
        order = tuple(map(int, order))
        if order not in self.known:
            outcome = simulate(self.graph, order)
            self.known[order] = outcome.seconds, outcome.peak
        seconds, peak = self.known[order]
        figure = float(peak) if self.least else seconds - self.once
        if figure < self.figure and (self.least or peak <= self.budget):
            self.figure, self.order = figure, order
        return seconds + self.price * max(0, peak - self.budget)

    @property
    def cost(self) -> float:
        """Cost of the best order; infinite if nothing fits yet."""
        return self.once + self.figure

    def round(self, order: Sequence[int], hot: float, spread: float, deadline: float, iterations: int | None = None,
              enough: Callable[[], bool] = lambda: False) -> None:
        """Anneal from `order` until `deadline` or for `iterations`, unless there is `enough` before.

        Args:
            hot: first temperature, in thrice the mean cost of an operation.
            spread: weight of the bytes over budget summed over runs, in an operation's share of them.
        """
        present, begin = self._coded(order)
        best, best_begin, before = np.zeros_like(present), 0, self.figure
        known = nothing_known(len(present), len(self.arrays.size))
        began, done = time.perf_counter(), 0
        length = max(deadline - began, 1e-9)
        left = iterations
        while (left is None or left > 0) and not enough():
            burst = max(50, int(self.rate * BURST)) if left is None else min(left, 20_000)
            passed = (time.perf_counter() - began) / length if left is None else 1 - left / iterations
            if passed >= 1:
                break
            ahead = min(1.0, passed + (burst / self.rate / length if left is None else burst / iterations))
            begin, best_begin, self.figure, self.price = anneal(
                self.arrays, present, begin, known, best, best_begin, self.figure, self.budget, self.least, burst,
                self.hot * hot * COOLING**passed, self.hot * hot * COOLING**ahead, self.price, self.highest,
                spread / self.operations, self.state)
            done += burst
            if left is None:
                self.rate = done / (time.perf_counter() - began)
            else:
                left -= burst
        if self.figure < before:
            self.order = tuple(int(code) % self.operations for code in best[best_begin:])

    def _coded(self, order: Sequence[int]) -> tuple[np.ndarray, int]:
        seen: set[int] = set()
        codes = np.zeros(max(self.room, len(order) + 64), np.int64)
        begin = len(codes) - len(order)
        for position, operation in enumerate(order):
            codes[begin + position] = operation + self.operations * (operation in seen)
            seen.add(operation)
        return codes, begin

"""Rounds of annealing limited by time or by moves, toward the cheapest order that fits or toward the lowest peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from strategies.rematerialization.solve.annealing import anneal
from strategies.rematerialization.solve.annealing_moves import Arrays, nothing_known
from strategies.rematerialization.solve.graph import Graph, simulate

ROOM = 8  # an order holds at most this many runs per operation on average
BURST = 0.03  # seconds of annealing between two checks of the clock
COOLING = 1e-3  # ratio of last to first temperature
DEAREST = 100  # ratio of the highest to the first price of a byte; higher would freeze the search at low excess


def arrays(graph: Graph) -> Arrays:
    """The graph as arrays for compiled code, with duplicate reads removed."""
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
    """Annealing toward the cheapest order that fits `budget` or, if `least`, toward the lowest peak.

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
        self.known: dict[tuple[int, ...], tuple[float, int]] = {}  # cost and peak of orders offered
        self.rate = 1e5  # moves per second, measured as it goes

    def offer(self, order: Sequence[int]) -> float:
        """Make `order` the best if it is better; returns its cost plus the price of its bytes over budget."""
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
        """Anneal from `order` until `deadline` or for `iterations` moves, or until `enough()` holds.

        Args:
            order: where to start.
            hot: initial temperature, in units of three times the mean cost of an operation.
            spread: weight of the bytes over budget summed over runs, in units of 1 / operations.
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

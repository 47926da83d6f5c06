"""Which operations to run again, and when, so that a step fits its memory at the least cost, with a proven bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from strategies.rematerialization.bound import Bound, least_bytes
from strategies.rematerialization.graph import Graph, simulate
from strategies.rematerialization.search import Searcher

THREADED = 2.0  # from this many seconds on the bound and a second search get a thread of their own
SHARE = 0.3  # below it, the share of the time that goes to the bound first
ROUNDS = ((0.1, 0.3, 1.0, "best"), (0.2, 0.03, 1.0, "best"), (0.3, 1.0, 8.0, "first"), (0.5, 0.1, 1.0, "best"),
          (1.0, 0.03, 1.0, "best"))
"""Rounds of annealing: (share of the time left, first temperature, spread, from which order)."""


@dataclass(frozen=True)
class Solution:
    """An order that fits, checked by the simulator.

    Attributes:
        order: operations as they run, reruns included.
        seconds: its cost in the graph's unit.
        peak: its peak bytes.
        bound: what every order with first runs in the graph's numbering that fits costs at least.
        gap: (seconds - bound) / seconds, 0 for a proven optimum.
    """

    order: tuple[int, ...]
    seconds: float
    peak: int
    bound: float
    gap: float


class Infeasible(Exception):
    """No order was found that fits.

    Attributes:
        peak: the least peak an order was found for, in bytes.
        bound: no order peaks below this many bytes.
        order: the order with that least peak.
    """

    def __init__(self, budget: int, peak: int, bound: int, order: tuple[int, ...]):
        self.peak, self.bound, self.order = peak, bound, order
        super().__init__(f"no order found that fits {budget} bytes: the least peak found is {peak} bytes, "
                         f"and none is below {bound} bytes")


def solve(graph: Graph, budget: int, seconds: float, seed: int = 0, bound: bool = True,
          start: Sequence[int] | None = None, iterations: int | None = None) -> Solution:
    """The cheapest order found in `seconds` of wall time whose peak is at most `budget` bytes.

    Args:
        seed: of the search. Calls with the same seed and `iterations` give the same order; with only a time limit
            they need not.
        bound: whether to spend time on the lower bound; without, it is the cost of running everything once.
        start: an order to begin with.
        iterations: moves of the search instead of a time limit; `seconds` then limits the bound alone.

    Raises:
        Infeasible: no order was found that fits.
        ValueError: `start` is not an order of the graph.
    """
    deadline = time.perf_counter() + seconds
    search, prover = Searcher(graph, budget, seed), Bound(graph, budget)
    starts = prover.starts  # the prover adds to them
    starts += [tuple(range(len(graph.seconds))), *([] if start is None else [tuple(start)])]
    for order in starts:
        search.offer(order)
    if np.isinf(prover.value):
        raise infeasible(graph, budget, seconds, seed)

    def proven() -> bool:
        return search.cost <= prover.value

    if iterations is not None:
        rounds(search, starts, deadline, proven, iterations)
        if bound and search.order is not None and not proven():
            prover.several(prover.single(deadline), deadline)
    elif not proven() and bound:
        (beside if seconds >= THREADED else in_turn)(search, prover, starts, deadline, proven)
    elif not proven():
        rounds(search, starts, deadline, proven)
    if search.order is None:
        least = infeasible(graph, budget, seconds, seed)
        if search.offer(least.order) and search.order is None:
            raise least
    outcome = simulate(graph, search.order)
    assert outcome.peak <= budget, (outcome.peak, budget)
    gap = max(0.0, outcome.seconds - prover.value) / outcome.seconds if outcome.seconds else 0.0
    return Solution(search.order, outcome.seconds, outcome.peak, min(prover.value, outcome.seconds), gap)


def rounds(search: Searcher, starts: list[tuple[int, ...]], deadline: float, enough: Callable[[], bool],
           iterations: int | None = None) -> None:
    """Anneal in rounds (`ROUNDS`), from the best of `starts` or from the first; what they find is added to `starts`."""
    left = iterations
    for share, hot, spread, source in ROUNDS:
        begin = starts[0] if source == "first" else min(list(starts), key=search.offer)
        now = time.perf_counter()
        moves = None if left is None else max(1, int(left * share))
        search.round(begin, hot, spread, now + share * (deadline - now), moves, enough)
        left = None if left is None else left - moves
        if search.order is not None:
            starts.append(search.order)


def in_turn(search: Searcher, prover: Bound, starts: list[tuple[int, ...]], deadline: float,
            proven: Callable[[], bool]) -> None:
    """First the bound, as its solution is a good start, then the search."""
    now = time.perf_counter()
    prover.single(now + SHARE * (deadline - now), tries=3)
    rounds(search, starts, deadline, proven)


def beside(search: Searcher, prover: Bound, starts: list[tuple[int, ...]], deadline: float,
           proven: Callable[[], bool]) -> None:
    """The bound and then a second search in one thread, a search in another (all without Python's lock)."""
    def prove() -> None:
        moment = prover.single(deadline)
        if not proven():
            prover.several(moment, min(deadline, time.perf_counter() + SHARE * (deadline - time.perf_counter())))
        second = Searcher(search.graph, search.budget, seed=search.seed + 1)
        rounds(second, starts, deadline, lambda: proven() or second.cost <= prover.value)

    thread = threading.Thread(target=prove, daemon=True)
    thread.start()
    rounds(search, starts, deadline, proven)
    thread.join()
    for order in starts:
        search.offer(order)


def infeasible(graph: Graph, budget: int, seconds: float, seed: int) -> Infeasible:
    """The error that says what would fit, after a tenth of the time spent on finding out."""
    least = least_peak(graph, 0.1 * seconds, seed)
    return Infeasible(budget, least.peak, least.bound, least.order)


@dataclass(frozen=True)
class Least:
    """The order with the least peak found, its cost and peak, and a proven bound on any order's peak, in bytes."""

    order: tuple[int, ...]
    seconds: float
    peak: int
    bound: int


def least_peak(graph: Graph, seconds: float, seed: int = 0, iterations: int | None = None) -> Least:
    """The order with the least peak found in `seconds` (or `iterations` moves), and what no order can do without."""
    deadline = time.perf_counter() + seconds
    bound = least_bytes(graph)
    search = Searcher(graph, bound, seed, least=True)
    first = tuple(range(len(graph.seconds)))
    search.offer(first)
    rounds(search, [first], deadline, lambda: search.figure <= bound, iterations)
    outcome = simulate(graph, search.order)
    return Least(search.order, outcome.seconds, outcome.peak, bound)

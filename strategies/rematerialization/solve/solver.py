"""The solver: search for the cheapest order of operations, reruns included, that fits a memory budget, and bound it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from strategies.rematerialization.solve.annealing_search import Searcher
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.lower_bound import Bound, least_bytes
from strategies.rematerialization.solve.relief import relieve

THREADED = 2.0  # with at least this many seconds, the bound and a second search get a thread of their own
SHARE = 0.3  # of the time, for bounds where they take turns with the search
LARGE = 400  # operations, from which on annealing finds little in seconds unless it begins with a repaired order
QUICK = 0.04  # of the time, for improving the first start that a bound suggests before the proof goes on
AS_GOOD_AS_PROVEN = 2e-6  # relative gap that counts as optimal, as bounds are lowered by solver tolerances
PROOF = 0.6  # of the time, after which the bound's thread stops proving and searches too
ROUNDS = ((0.06, 0.03, 0.2, "best"), (0.12, 1.0, 0.2, "first"), (0.1, 0.3, 8.0, "first"), (0.16, 0.3, 0.2, "first"),
          (0.2, 0.1, 0.2, "best"), (0.25, 0.3, 0.1, "first"), (0.33, 1.0, 0.2, "first"), (0.5, 0.1, 0.2, "first"),
          (0.5, 0.1, 0.2, "best"), (1.0, 0.03, 0.2, "best"))
"""Rounds of annealing: (share of the remaining time, initial temperature, spread, starting order).

A low spread finds cheaper orders; a high one finds orders that fit at all when memory is short everywhere.
"""


@dataclass(frozen=True)
class Solution:
    """An order that fits the budget, checked by the simulator.

    Attributes:
        order: operations in execution order, reruns included.
        seconds: its cost in the graph's unit.
        peak: its peak bytes.
        bound: lower bound on the cost of every order that fits and whose first runs follow the graph's numbering.
        gap: (seconds - bound) / seconds; 0 for a proven optimum.
    """

    order: tuple[int, ...]
    seconds: float
    peak: int
    bound: float
    gap: float


class Infeasible(Exception):
    """No order that fits was found.

    Attributes:
        peak: lowest peak found, in bytes.
        bound: proven lower bound on every order's peak, in bytes.
        order: the order with the lowest peak.
    """

    def __init__(self, budget: int, peak: int, bound: int, order: tuple[int, ...]):
        self.peak, self.bound, self.order = peak, bound, order
        super().__init__(f"no order found that fits {budget} bytes: the least peak found is {peak} bytes, "
                         f"and none is below {bound} bytes")


def solve(graph: Graph, budget: int, seconds: float, seed: int = 0, bound: bool = True,
          start: Sequence[int] | None = None, iterations: int | None = None,
          gap: float = AS_GOOD_AS_PROVEN, least: float = 0.0) -> Solution:
    """The cheapest order found in `seconds` of wall time whose peak is at most `budget` bytes.

    Args:
        graph: the operations and the values they make.
        budget: bytes.
        seconds: time limit.
        seed: seed of the search. Calls with the same seed and `iterations` return the same order; with only a time
            limit they may not.
        bound: whether to spend time on the lower bound; without, it is the cost of running everything once.
        start: an order to start from.
        iterations: number of moves to search for instead of a time limit; `seconds` then limits the bound alone.
        gap: stop once no order can be cheaper by more than this fraction.
        least: a lower bound on the cost of orders that fit, already proven for this graph.

    Raises:
        Infeasible: no order that fits was found.
        ValueError: `start` is not an order of the graph.
    """
    deadline = time.perf_counter() + seconds
    search, prover = Searcher(graph, budget, seed), Bound(graph, budget)
    prover.value = max(prover.value, least)
    starts = prover.starts  # the prover adds to them
    starts += [tuple(range(len(graph.seconds))), *([] if start is None else [tuple(start)])]
    for order in starts:
        search.offer(order)
    if np.isinf(prover.value):
        raise infeasible(graph, budget, seconds, seed, iterations)

    def proven() -> bool:
        return search.cost <= (1 + gap) * prover.value

    if iterations is not None:
        if not proven():
            rounds(search, starts, deadline, proven, iterations)
        if bound and search.order is not None and not proven():
            prover.first(deadline)
            prover.tighten(deadline, proven)
    elif not proven() and bound and seconds >= THREADED:
        if len(graph.seconds) > LARGE:
            starts.append(relieve(search.arrays, starts[0], budget, search.room))
        beside(search, prover, starts, deadline, gap)
    elif not proven() and bound:
        in_turn(search, prover, starts, deadline, proven)
    elif not proven():
        rounds(search, starts, deadline, proven)
    if search.order is None:
        lowest = infeasible(graph, budget, seconds, seed, iterations)
        search.offer(lowest.order)
        if search.order is None:
            raise lowest
    outcome = simulate(graph, search.order)
    assert outcome.peak <= budget, (outcome.peak, budget)
    assert prover.value <= outcome.seconds * (1 + 1e-3), (prover.value, outcome.seconds)  # solvers round
    proved = min(prover.value, outcome.seconds)
    return Solution(search.order, outcome.seconds, outcome.peak, proved,
                    (outcome.seconds - proved) / outcome.seconds if outcome.seconds else 0.0)


def rounds(search: Searcher, starts: list[tuple[int, ...]], deadline: float, enough: Callable[[], bool],
           iterations: int | None = None) -> None:
    """Anneal in rounds (`ROUNDS`), from the best of `starts` or from the first; results are added to `starts`."""
    left = iterations
    for share, hot, spread, source in ROUNDS:
        begin = starts[0] if source == "first" else min(list(starts), key=search.offer)
        now = time.perf_counter()
        moves = None if left is None else max(1, int(left * share))
        if source == "first" and search.order is None and not search.least:
            starts.append(least_peak(search.graph, share * (deadline - now), search.seed, moves).order)
            begin = starts[-1]
        search.round(begin, hot, spread, now + share * (deadline - now), moves, enough)
        left = None if left is None else left - moves
        if search.order is not None:
            starts.append(search.order)


def in_turn(search: Searcher, prover: Bound, starts: list[tuple[int, ...]], deadline: float,
            proven: Callable[[], bool]) -> None:
    """Bound first, as its solutions are good starting orders, then search."""
    now = time.perf_counter()
    prover.first(now + SHARE * (deadline - now))
    prover.tighten(now + SHARE * (deadline - now), lambda: offered(search, prover) and proven())
    rounds(search, starts, deadline, proven)


def beside(search: Searcher, prover: Bound, starts: list[tuple[int, ...]], deadline: float, gap: float) -> None:
    """Bound and then search in one thread, search in another; the compiled code and HiGHS release the GIL."""
    second = Searcher(search.graph, search.budget, seed=search.seed + 1)

    def enough() -> bool:
        return min(search.cost, second.cost) <= (1 + gap) * prover.value

    def prove() -> None:
        begin = time.perf_counter()
        prover.first(begin + SHARE * (deadline - begin))
        offered(second, prover)
        now = time.perf_counter()
        second.round(min(list(starts), key=second.offer), 0.03, 0.2, now + QUICK * (deadline - now), enough=enough)
        starts.extend([] if second.order is None else [second.order])
        prover.tighten(begin + PROOF * (deadline - begin), lambda: offered(second, prover) and enough())
        if not enough():
            rounds(second, starts, deadline, enough)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(prove)
        rounds(search, starts, deadline, enough)
        other.result()
    for order in starts:
        search.offer(order)


def offered(search: Searcher, prover: Bound) -> bool:
    """Let the search know what the last relaxation suggests, which can be an optimum; if it does not fit, repair it.

    Repairing begins with the third moment in graphs that are not large, as most are solved before.
    """
    if prover.order is not None:
        search.offer(prover.order)
        late = len(prover.moments) > 2 or search.operations > LARGE
        if late and prover.worst(prover.order) is not None:
            repaired = relieve(search.arrays, prover.order, search.budget, search.room)
            prover.starts.append(repaired)
            search.offer(repaired)
    return True


def infeasible(graph: Graph, budget: int, seconds: float, seed: int, iterations: int | None = None) -> Infeasible:
    """The error with the lowest peak found, after spending a tenth of the time on finding it."""
    least = least_peak(graph, 0.1 * seconds, seed, iterations)
    return Infeasible(budget, least.peak, least.bound, least.order)


@dataclass(frozen=True)
class Least:
    """The order with the lowest peak found, its cost and peak, and a lower bound on any order's peak, in bytes."""

    order: tuple[int, ...]
    seconds: float
    peak: int
    bound: int


def least_peak(graph: Graph, seconds: float, seed: int = 0, iterations: int | None = None) -> Least:
    """The order with the lowest peak found in `seconds` (or `iterations` moves), and a lower bound on the peak."""
    deadline = time.perf_counter() + seconds
    bound = least_bytes(graph)
    search = Searcher(graph, bound, seed, least=True)
    first = tuple(range(len(graph.seconds)))
    search.offer(first)
    rounds(search, [first], deadline, lambda: search.figure <= bound, iterations)
    outcome = simulate(graph, search.order)
    return Least(search.order, outcome.seconds, outcome.peak, bound)

"""Proven lower bounds on the recomputation cost under a budget and on the peak memory of any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.order import unroll
from strategies.rematerialization.solve.relaxation import Program, program

TOLERANCE = 1e-6  # relative tolerance of HiGHS, by which its bounds are lowered before they count as proven


class Bound:
    """Lower bounds on the cost of orders that fit `budget`, tightened with every call.

    They hold for orders whose first runs follow the graph's numbering (Checkmate's frontier-advancing stages). A moment
    is the first run of an operation (see relaxation.py).

    Attributes:
        value: the best bound proven so far, in the graph's unit; infinite if no order can fit.
        starts: orders built from the relaxations' solutions, good starts for a search; they may not fit.
        moments: the moments looked at so far.
        order: the order that the last relaxation's solution suggests; None if there is none.
    """

    def __init__(self, graph: Graph, budget: int):
        self.graph, self.budget = graph, budget
        self.value = float(np.sum(graph.seconds))
        self.starts: list[tuple[int, ...]] = []
        self.whole = bool(np.all(np.asarray(graph.seconds) == np.round(graph.seconds)))
        self.moments: list[int] = []
        self.order: tuple[int, ...] | None = None
        if least_bytes(graph) > budget:
            self.value = np.inf

    def first(self, deadline: float) -> None:
        """Bound by the moment at which most is resident: usually the best single moment, and a good start."""
        resident = simulate(self.graph, range(len(self.graph.seconds))).resident
        self.moments = [int(resident.argmax())]
        self.prove(program(self.graph, self.budget, self.moments), deadline)

    def tighten(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Bound by more and more moments jointly, each the one at which the last solution's order needs most.

        Few are needed, as one moment speaks for its neighbors. If no moment is left at which that order needs more than
        the budget, the solution is that of the program of all moments, and only reruns between them can still need more
        memory. It stops early when `enough()` holds.
        """
        while time.perf_counter() < deadline and np.isfinite(self.value) and not enough():
            worst = None if self.order is None else self.worst(self.order)
            if worst is None:
                return
            self.moments = sorted([*self.moments, worst])
            if not self.prove(program(self.graph, self.budget, self.moments), deadline):
                return

    def worst(self, order: Sequence[int]) -> int | None:
        """The moment at which an order needs most bytes above the budget, of those not looked at; None if it fits."""
        first = np.full(len(self.graph.seconds), -1)
        for position, operation in reversed(list(enumerate(order))):
            first[operation] = position
        over = simulate(self.graph, order).resident[first] - self.budget
        over[self.moments] = 0
        return int(over.argmax()) if over.max() > 0 else None

    def prove(self, relaxation: Program, deadline: float) -> bool:
        """Solve a relaxation, keep its bound and the order its solution suggests; returns whether it was solved."""
        answer = relaxation.solve(deadline - time.perf_counter())
        if answer.status == 2:
            self.value = np.inf
            return True
        found = answer.mip_dual_bound
        if found is None or not np.isfinite(found):  # stopped without a bound
            return False
        proven = relaxation.constant + found - TOLERANCE * abs(found)
        if self.whole:
            proven = float(np.ceil(proven - 1e-3))
        self.value = max(self.value, proven)
        if answer.x is not None:
            self.order = unroll(self.graph, relaxation.moments, relaxation.kept(answer.x))
            self.starts.append(self.order)
        return answer.status == 0


def least_bytes(graph: Graph) -> int:
    """Bytes that no order can do without: those of the most demanding operation.

    That counts its inputs, outputs and workspace, the held values made before its first run, and the values of
    once-only operations that were made before and that a later operation reads.
    """
    last = np.full(len(graph.maker), -1)
    for operation, read in enumerate(graph.reads):
        last[list(read)] = operation
    once = np.isin(graph.maker, list(graph.once))
    held = np.isin(np.arange(len(last)), list(graph.held))
    last[held] = len(graph.seconds)
    stays = held | once
    until, size = np.where(stays, last, -1), np.asarray(graph.size)
    most, makes = 0, graph.makes
    for operation, read in enumerate(graph.reads):
        there = (graph.maker < operation) & (operation < until)
        there[[*read, *makes[operation]]] = True
        most = max(most, int(graph.workspace[operation]) + int(size[there].sum()))
    return most + int(graph.fixed)

"""Proven lower bounds on the recomputation cost under a budget and on the peak memory of any order."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.order import unroll
from strategies.rematerialization.solve.relaxation import Program, program

TOLERANCE = 1e-6  # relative tolerance of HiGHS, by which its bounds are lowered before they count as proven
COARSE = 12  # moments tried first, spread over those at which keeping everything does not fit
TRIES = 3  # single moments solved as integer programs


class Bound:
    """Lower bounds on the cost of orders that fit `budget`, tightened with every call.

    They hold for orders whose first runs follow the graph's numbering (Checkmate's frontier-advancing stages). A moment
    is the first run of an operation (see relaxation.py).

    Attributes:
        value: the best bound proven so far, in the graph's unit; infinite if no order can fit.
        starts: orders built from the relaxations' solutions, good starts for a search; they may not fit.
    """

    def __init__(self, graph: Graph, budget: int):
        self.graph, self.budget = graph, budget
        self.value = float(np.sum(graph.seconds))
        self.starts: list[tuple[int, ...]] = []
        self.whole = bool(np.all(np.asarray(graph.seconds) == np.round(graph.seconds)))
        self.singles: dict[int, float] = {}  # bound of each moment alone, from the linear relaxation
        self.tight = simulate(graph, range(len(graph.seconds))).resident
        if least_bytes(graph) > budget:
            self.value = np.inf

    def first(self, deadline: float) -> None:
        """Bound by the moment at which most is resident: usually the best single moment, and a good start."""
        self.prove(program(self.graph, self.budget, [int(self.tight.argmax())]), deadline)

    def single(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Bound by single moments: linear programs in up to half of the time, then the best few in integers.

        This and `several` stop early when `enough()` holds.
        """
        begin = time.perf_counter()
        until = begin + 0.5 * (deadline - begin) if np.isfinite(deadline) else deadline
        short = np.flatnonzero(self.tight > self.budget)
        coarse = short[np.linspace(0, len(short) - 1, min(len(short), COARSE)).astype(int)]
        for moment in dict.fromkeys([int(self.tight.argmax()), *coarse.tolist(), *short.tolist()]):
            if self.singles and (time.perf_counter() > until or enough()):
                break
            self.singles[moment] = self.prove(program(self.graph, self.budget, [moment]), deadline, whole=False)
        for moment in self.peaks()[:TRIES]:
            if time.perf_counter() < deadline and not enough():
                self.prove(program(self.graph, self.budget, [moment]), deadline)

    def peaks(self) -> list[int]:
        """Moments whose bound is at least that of their neighbors, best first."""
        moments = sorted(self.singles)
        bounds = [-np.inf, *(self.singles[moment] for moment in moments), -np.inf]
        high = [moment for moment, before, here, after in zip(moments, bounds, bounds[1:], bounds[2:], strict=False)
                if here >= before and here > after]
        return sorted(high, key=lambda moment: -self.singles[moment])

    def several(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Bound by more and more moments jointly: the best single ones, then others where memory is short."""
        short = np.flatnonzero(self.tight > self.budget)
        for count in (2, 3, 5, 8, 12, 18, 27):
            if deadline - time.perf_counter() < 0.5 or not len(short) or enough():
                return
            spread = short[np.linspace(0, len(short) - 1, count).astype(int)] if count > 3 else []
            moments = {*self.peaks()[:count], *map(int, spread)}
            self.prove(program(self.graph, self.budget, sorted(moments)), deadline)

    def prove(self, relaxation: Program, deadline: float, whole: bool = True) -> float:
        """Solve a relaxation and keep its bound and the order its solution suggests; returns the bound."""
        answer = relaxation.solve(deadline - time.perf_counter(), whole)
        if answer.status == 2:
            self.value = np.inf
            return np.inf
        found = answer.mip_dual_bound if whole else (answer.fun if answer.status == 0 else None)
        if found is None or not np.isfinite(found):  # stopped without a bound
            return 0.0
        proven = relaxation.constant + found - TOLERANCE * abs(found)
        if self.whole:
            proven = float(np.ceil(proven - 1e-3))
        self.value = max(self.value, proven)
        if whole and answer.x is not None:
            self.starts.append(unroll(self.graph, relaxation.moments, relaxation.kept(answer.x)))
        return proven


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

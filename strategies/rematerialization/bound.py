"""Proven lower bounds on the cost of rematerialization, and on the least memory it can reach."""

from __future__ import annotations

import time

import numpy as np

from strategies.rematerialization.graph import Graph, simulate
from strategies.rematerialization.moments import Program, program
from strategies.rematerialization.orders import unroll

TOLERANCE = 1e-6  # of HiGHS's own, relative: what it proves is lowered by this much before it is believed


class Bound:
    """Lower bounds on the cost of orders that fit `budget`, better with every call.

    They hold for orders whose first runs follow the graph's numbering (Checkmate's frontier-advancing stages).

    Attributes:
        value: the best bound proven so far, in the graph's unit; infinite if nothing can fit.
        starts: orders made from the relaxations' solutions, good to start a search from; they may not fit.
    """

    def __init__(self, graph: Graph, budget: int):
        self.graph, self.budget = graph, budget
        self.value = float(np.sum(graph.seconds))
        self.starts: list[tuple[int, ...]] = []
        self.whole = bool(np.all(np.asarray(graph.seconds) == np.round(graph.seconds)))
        self.tight = simulate(graph, range(len(graph.seconds))).resident
        if not fits_locally(graph, budget):
            self.value = np.inf

    def single(self, deadline: float, tries: int = 12) -> int:
        """Bound by one moment: the best of some by linear program, then that one in integers. Returns the moment."""
        over = np.flatnonzero(self.tight > self.budget)
        if not len(over):
            return int(self.tight.argmax())
        chosen = {int(self.tight.argmax()), *over[np.linspace(0, len(over) - 1, tries).astype(int)].tolist()}
        values = {}
        for moment in sorted(chosen, key=lambda moment: -self.tight[moment]):
            if values and time.perf_counter() > deadline:
                break
            values[moment] = self.prove(program(self.graph, self.budget, [moment]), deadline, whole=False)
        best = max(values, key=values.get)
        self.prove(program(self.graph, self.budget, [best]), deadline)
        return best

    def several(self, moment: int, deadline: float) -> None:
        """Bound by more and more moments, spread over where memory is short and around the best single one."""
        over = np.flatnonzero(self.tight > self.budget)
        for count in (3, 5, 9, 17, 33):
            left = deadline - time.perf_counter()
            if left < 0.5 or not len(over):
                return
            moments = {moment, *over[np.linspace(0, len(over) - 1, count).astype(int)].tolist()}
            self.prove(program(self.graph, self.budget, sorted(moments)), deadline)

    def prove(self, relaxation: Program, deadline: float, whole: bool = True) -> float:
        """Solve a relaxation, keep what it proves and the order its solution suggests; returns the bound."""
        answer = relaxation.solve(deadline - time.perf_counter(), whole)
        if answer.status == 2:
            self.value = np.inf
            return np.inf
        found = answer.mip_dual_bound if whole else answer.fun
        if found is None or not np.isfinite(found):
            return 0.0
        proven = relaxation.constant + found - TOLERANCE * abs(found)
        if self.whole:
            proven = float(np.ceil(proven - 1e-3))
        self.value = max(self.value, proven)
        if whole and answer.x is not None:
            self.starts.append(unroll(self.graph, relaxation.moments, relaxation.kept(answer.x)))
        return proven


def fits_locally(graph: Graph, budget: int) -> bool:
    """Whether every operation fits alone; see `least_bytes`."""
    return least_bytes(graph) <= budget


def least_bytes(graph: Graph) -> int:
    """Bytes no order can do without: of the operation that needs most, inputs, outputs, workspace, what is held.

    Besides its own values, an operation's first run finds resident the held values made before it, and the values of
    operations that run once that a later operation reads for the first time.
    """
    last = np.full(len(graph.maker), -1)
    for operation, read in enumerate(graph.reads):
        last[list(read)] = operation
    once = np.isin(graph.maker, list(graph.once))
    held = np.isin(np.arange(len(last)), list(graph.held))
    last[held] = len(graph.seconds)
    stays = np.flatnonzero(held | once)
    most, makes = 0, graph.makes
    for operation, read in enumerate(graph.reads):
        resident = {*read, *makes[operation]}
        resident.update(value for value in stays if graph.maker[value] < operation < last[value])
        most = max(most, int(graph.workspace[operation]) + sum(int(graph.size[value]) for value in resident))
    return most + int(graph.fixed)

"""Checkmate's MILP (Jain et al. 2020, eq. 1-9) on HiGHS: a reference for the fast solver, and the "exact" solver.

There is one stage per operation. Stage t runs operation t for the first time, after recomputing what it needs in the
graph's order, each operation at most once. The program has O(operations x reads) variables, so it is for small graphs.
Orders it cannot express, such as a stage that runs an operation twice, can be cheaper still, so its optimum is not a
lower bound over all orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy

from strategies.common.highs import mixed_integer
from strategies.rematerialization.solve.graph import Graph

MOST_OPERATIONS = 28  # measured: a block of 25 operations took up to 5 s per program, one of 41 more than 60 s
PROOF = 120.0  # seconds allowed for one program


@dataclass(frozen=True)
class Exact:
    """HiGHS's answer.

    Attributes:
        status: "optimal", "time limit" or "infeasible".
        order: the best order found, or None.
        seconds: its cost, or None.
        bound: proven lower bound on the cost of every order the program can express, in the graph's unit; infinite if
            none fits.
    """

    status: str
    order: tuple[int, ...] | None
    seconds: float | None
    bound: float


def exact(graph: Graph, budget: int, seconds: float = 60.0) -> Exact:
    """Solve the program to optimality or until the time limit."""
    program = _Checkmate(graph, budget)
    answer = program.solve(whole=True, seconds=seconds)
    status = {0: "optimal", 1: "time limit", 2: "infeasible"}.get(answer.status, answer.message)
    if status == "infeasible":
        return Exact(status, None, None, np.inf)
    bound = 0.0 if answer.mip_dual_bound is None else float(answer.mip_dual_bound)
    if answer.x is None:
        return Exact(status, None, None, bound)
    ran = answer.x[program.run] > 0.5
    order = tuple(int(operation) for stage in ran for operation in np.flatnonzero(stage))
    return Exact(status, order, float(answer.fun), bound)


class NotExact(ValueError):
    """A graph for which the exact program cannot be solved.

    Attributes:
        operations: number of operations in the graph.
        reason: why, in words, without the graph's name.
    """

    def __init__(self, name: str, operations: int, reason: str) -> None:
        self.operations, self.reason = operations, reason
        super().__init__(f"{name} with its {operations} operations {reason}")


def check_size(name: str, operations: int) -> None:
    """Raise `NotExact` if a graph has more operations than HiGHS can be expected to solve to proven optimality."""
    if operations > MOST_OPERATIONS:
        raise NotExact(name, operations, f"is too large for the exact program, which takes {MOST_OPERATIONS} at most")


def optimal(graph: Graph, budget: int, name: str = "the graph") -> Exact:
    """The program's proven optimum; its order is None if no order that the program can express fits.

    Raises:
        NotExact: the graph is too large, or was not solved to optimality within `PROOF` seconds.
    """
    check_size(name, len(graph.seconds))
    found = exact(graph, budget, PROOF)
    if found.status not in ("optimal", "infeasible"):
        raise NotExact(name, len(graph.seconds), f"was not solved to a proven optimum within {PROOF:.0f} s "
                                                 f"({found.status})")
    return found


def linear_bound(graph: Graph, budget: int) -> float:
    """Optimum of the program's linear relaxation: a lower bound on its optimum, infinite if even that does not fit."""
    answer = _Checkmate(graph, budget).solve(whole=False, seconds=np.inf)
    return float(answer.fun) if answer.status == 0 else np.inf


class _Checkmate:
    """The program: columns run[t, o] (R) and keep[t, v] (S), then U and FREE; memory is in units of the budget."""

    def __init__(self, graph: Graph, budget: int):
        operations, values = len(graph.seconds), len(graph.maker)
        self.graph, self.makes = graph, graph.makes
        self.unit = float(max(budget, 1))
        self.run = np.arange(operations**2).reshape(operations, operations)
        self.keep = operations**2 + np.arange((operations + 1) * values).reshape(operations + 1, values)
        self.columns = operations**2 + (operations + 1) * values
        self.whole = self.columns  # columns before this one are binary
        self.lower, self.upper = [0.0] * self.columns, [1.0] * self.columns
        self.entries: list[tuple[int, int, float]] = []
        self.limits: list[tuple[float, float]] = []
        self.readers: list[list[int]] = [[] for _ in range(values)]
        for operation, read in enumerate(graph.reads):
            for value in set(read):
                self.readers[value].append(operation)
        self.fix_known()
        for stage in range(operations):
            self.depend(stage)
            self.account(stage)

    def solve(self, whole: bool, seconds: float):
        """Minimize eq. 1 with R and S binary or in [0, 1]; FREE reaches its upper bound without being binary."""
        rows, columns, factors = zip(*self.entries, strict=True)
        matrix = scipy.sparse.csr_array((factors, (rows, columns)), shape=(len(self.limits), self.columns))
        cost = np.zeros(self.columns)
        cost[self.run] = self.graph.seconds
        integer = np.zeros(self.columns)
        integer[: self.whole] = int(whole)
        options = {} if np.isinf(seconds) else {"time_limit": seconds}
        low, high = np.array(self.limits).T
        return mixed_integer(cost, constraints=scipy.optimize.LinearConstraint(matrix, low, high), integrality=integer,
                             bounds=scipy.optimize.Bounds(self.lower, self.upper),
                             options={**options, "mip_rel_gap": 0.0})

    def row(self, terms: list[tuple[int, float]], low: float = -np.inf, high: float = np.inf) -> None:
        """Add the constraint low <= sum of factor * column <= high."""
        self.entries += [(len(self.limits), column, factor) for column, factor in terms]
        self.limits.append((low, high))

    def column(self, high: float) -> int:
        """Add a continuous column in [0, high]."""
        self.lower.append(0.0)
        self.upper.append(high)
        self.columns += 1
        return self.columns - 1

    def fix_known(self) -> None:
        """Fix bounds: frontier-advancing stages (eq. 1d-1e and section 4.6), operations that run once, held values."""
        graph, operations = self.graph, len(self.graph.seconds)
        for stage in range(operations):
            self.lower[self.run[stage, stage]] = 1.0
            for operation in range(operations):
                if operation > stage or (operation < stage and operation in graph.once):
                    self.upper[self.run[stage, operation]] = 0.0
        for value, maker in enumerate(graph.maker):
            for stage in range(operations + 1):
                if stage <= maker or (stage == operations and value not in graph.held):
                    self.upper[self.keep[stage, value]] = 0.0
                elif value in graph.held:
                    self.lower[self.keep[stage, value]] = 1.0

    def depend(self, stage: int) -> None:
        """Inputs are kept or made in the stage (eq. 1b); what is kept on was kept or made in it (eq. 1c)."""
        for operation in range(stage + 1):
            for value in set(self.graph.reads[operation]):
                there = [(self.keep[stage, value], -1.0), (self.run[stage, self.graph.maker[value]], -1.0)]
                self.row([(self.run[stage, operation], 1.0), *there], high=0.0)
        for value, maker in enumerate(self.graph.maker):
            there = [(self.keep[stage, value], -1.0), (self.run[stage, maker], -1.0)]
            self.row([(self.keep[stage + 1, value], 1.0), *there], high=0.0)

    def account(self, stage: int) -> None:
        """Memory in use at every operation of the stage (eq. 2-3), which has to fit with the operation's workspace."""
        graph, unit = self.graph, self.unit
        used = [(self.keep[stage, value], float(size) / unit) for value, size in enumerate(graph.size)]
        constant = graph.fixed / unit
        for operation in range(stage + 1):
            made = sum(float(graph.size[value]) for value in self.makes[operation]) / unit
            now = self.column(1.0)  # U, at most the budget
            workspace = float(graph.workspace[operation]) / unit
            self.row([(now, -1.0), *used, (self.run[stage, operation], made)], high=-constant, low=-constant)
            self.row([(now, 1.0), (self.run[stage, operation], workspace)], high=1.0)
            used, constant = [(now, 1.0), *self.frees(stage, operation)], 0.0

    def frees(self, stage: int, operation: int) -> list[tuple[int, float]]:
        """Terms of what is freed after the operation (eq. 4-8), with each hazard of eq. 7 as its own constraint."""
        graph, terms = self.graph, []
        for value in {*graph.reads[operation], *self.makes[operation]}:
            size = float(graph.size[value]) / self.unit
            if not size:
                continue
            free = self.column(1.0)
            self.row([(free, 1.0), (self.run[stage, operation], -1.0)], high=0.0)
            again = value in graph.held and value in self.makes[operation] and operation < stage
            if not again:  # a recomputed copy of a held value lies beside the held one and is freed at once
                self.row([(free, 1.0), (self.keep[stage + 1, value], 1.0)], high=1.0)
                for reader in self.readers[value]:
                    if operation < reader <= stage:
                        self.row([(free, 1.0), (self.run[stage, reader], 1.0)], high=1.0)
            terms.append((free, -size))
        return terms

"""A MILP relaxation of rematerialization that checks memory at only a few moments.

A *moment* is the first run of an operation. Between two moments an operation is paid for once, however often it runs,
and memory is unlimited; at a moment, what is resident has to fit. Checkmate (Jain et al. 2020, eq. 1-9) is the case in
which every operation is a moment; fewer moments give a smaller program whose optimum is still a lower bound. The bound
holds for every order whose first runs follow the graph's numbering (Checkmate's frontier-advancing stages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult

from strategies.common.highs import mixed_integer
from strategies.rematerialization.solve.graph import Graph


@dataclass(frozen=True, eq=False)
class Program:
    """min cost @ z + constant subject to rows @ z <= limit, 0 <= z <= 1, with integer z unless relaxed.

    `keep[k][i]` is the column that says whether value i is resident at moment k (1-based), `run[k][j]` the one that
    says whether operation j runs between moments k and k + 1. Either can be `ALWAYS` or `NEVER` instead of a column.
    """

    moments: tuple[int, ...]
    cost: np.ndarray
    constant: float
    rows: sparse.csr_array
    limit: np.ndarray
    keep: np.ndarray
    run: np.ndarray

    def solve(self, seconds: float, whole: bool = True, gap: float = 0.0, nodes: int | None = None) -> OptimizeResult:
        """HiGHS's answer; its `mip_dual_bound` (or `fun` for the linear program) plus `constant` is the lower bound.

        Costs are solved for in units of the largest one: HiGHS takes a program for solved within 1e-6 of its cost, and
        reports a bound that much too high, which is a share of a percent where operations take microseconds.

        Args:
            seconds: time limit.
            whole: whether columns are integer.
            gap: relative gap at which to stop.
            nodes: limit on the branch and bound that, unlike seconds, stops it at the same place every time.
        """
        if not self.cost.size:
            status = 2 if (self.limit < 0).any() else 0
            return OptimizeResult(status=status, fun=0.0, mip_dual_bound=0.0, x=np.zeros(0))
        unit = float(self.cost.max()) or 1.0
        options = {"mip_rel_gap": gap} | ({} if np.isinf(seconds) else {"time_limit": max(seconds, 0.01)})
        answer = mixed_integer(
            self.cost / unit, constraints=LinearConstraint(self.rows, -np.inf, self.limit), bounds=Bounds(0, 1),
            integrality=np.full(self.cost.size, int(whole)),
            options=options | ({} if nodes is None else {"node_limit": nodes}))
        for name in ("fun", "mip_dual_bound"):
            if answer.get(name) is not None:
                answer[name] *= unit
        return answer

    def kept(self, solution: np.ndarray) -> list[set[int]]:
        """For every moment, the values that a solution (columns,) keeps resident."""
        def there(column: int) -> bool:
            return column == ALWAYS or (column != NEVER and solution[column] > 0.5)

        return [{value for value, column in enumerate(row) if there(column)} for row in self.keep[1:]]


ALWAYS, NEVER = -1, -2


def program(graph: Graph, budget: int, moments: Sequence[int]) -> Program:
    """The relaxation of `graph` under `budget` bytes that checks memory at the first runs of `moments`."""
    return _Builder(graph, budget, sorted(moments)).build()


class _Builder:
    def __init__(self, graph: Graph, budget: int, moments: list[int]):
        self.graph, self.budget, self.moments = graph, budget, moments
        self.cost: list[float] = []
        self.entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.limit: list[float] = []
        self.constant = float(sum(graph.seconds[moment] for moment in moments))

    def column(self, cost: float) -> int:
        self.cost.append(cost)
        return len(self.cost) - 1

    def row(self, terms: list[tuple[int, float]], limit: float) -> None:
        """Add sum coefficient * column <= limit, where columns may be ALWAYS (1) or NEVER (0)."""
        limit -= sum(factor for column, factor in terms if column == ALWAYS)
        left = [(column, factor) for column, factor in terms if column >= 0]
        if limit >= 0 and all(factor < 0 for _, factor in left):
            return
        for column, factor in left:
            self.entries[0].append(len(self.limit))
            self.entries[1].append(column)
            self.entries[2].append(factor)
        self.limit.append(limit)

    def build(self) -> Program:
        graph, operations = self.graph, len(self.graph.seconds)
        keep = np.full((len(self.moments) + 1, len(graph.maker)), NEVER)
        run = np.full((len(self.moments) + 1, operations), NEVER)
        run[0, : self.moments[0]] = ALWAYS
        self.constant += float(graph.seconds[: self.moments[0]].sum())
        makes = graph.makes
        for k, moment in enumerate(self.moments, start=1):
            after = self.moments[k] if k < len(self.moments) else operations
            relevant = needed_after(graph, moment)
            self.keep_at(k, moment, keep, run, relevant)
            keep[k, list(makes[moment])] = ALWAYS
            self.run_between(k, moment, after, keep, run, relevant)
        for k, moment in enumerate(self.moments[:-1], start=1):
            self.run_after(k, moment, keep, run)
        rows = sparse.csr_array((self.entries[2], (self.entries[0], self.entries[1])),
                                shape=(len(self.limit), len(self.cost)))
        return Program(tuple(self.moments), np.array(self.cost), self.constant, rows, np.array(self.limit, float),
                       keep, run)

    def keep_at(self, k: int, moment: int, keep: np.ndarray, run: np.ndarray, relevant: np.ndarray) -> None:
        """What may be resident at moment k, what must be, and that it fits."""
        graph, useful = self.graph, np.zeros(len(self.graph.maker), bool)
        for operation in np.flatnonzero(relevant):
            useful[list(graph.reads[operation])] = True
        memory = []
        for value in np.flatnonzero(graph.maker < moment):
            if value in graph.held or value in graph.reads[moment]:
                keep[k, value] = ALWAYS
                self.row([(ALWAYS, 1), (keep[k - 1, value], -1), (run[k - 1, graph.maker[value]], -1)], 0)
            elif useful[value]:
                keep[k, value] = self.column(0.0)
                self.row([(keep[k, value], 1), (keep[k - 1, value], -1), (run[k - 1, graph.maker[value]], -1)], 0)
            memory.append((keep[k, value], float(graph.size[value])))
        made = sum(int(graph.size[value]) for value in graph.makes[moment])
        self.row(memory, self.budget - graph.fixed - int(graph.workspace[moment]) - made)

    def run_between(self, k: int, moment: int, after: int, keep: np.ndarray, run: np.ndarray,
                    relevant: np.ndarray) -> None:
        """What may run between moment k and the next, what must, and that its inputs are available."""
        graph = self.graph
        for operation in range(after):
            if moment < operation:
                run[k, operation] = ALWAYS
                self.constant += float(graph.seconds[operation])
            elif relevant[operation] and operation not in graph.once:
                run[k, operation] = self.column(float(graph.seconds[operation]))
        for operation in range(after):
            if run[k, operation] != NEVER:
                for value in graph.reads[operation]:
                    self.row([(run[k, operation], 1), (keep[k, value], -1), (run[k, graph.maker[value]], -1)], 0)

    def run_after(self, k: int, moment: int, keep: np.ndarray, run: np.ndarray) -> None:
        """What runs at any time after moment k, counted once, satisfies the program of moment k alone.

        This is implied for integers, and makes the linear relaxation at least as strong as that of every single moment.
        It is not otherwise: fractional reruns in several intervals could all rely on the same fractionally kept value.
        """
        graph, ever = self.graph, np.full(len(self.graph.seconds), NEVER)
        ever[moment + 1:] = ALWAYS
        for operation in range(moment + 1):
            runs = [(int(column), -1.0) for column in run[k:, operation] if column != NEVER]
            if runs:
                ever[operation] = self.column(0.0)
                self.row([(ever[operation], 1.0), *runs], 0)
        for operation in np.flatnonzero(ever != NEVER):
            for value in graph.reads[operation]:
                self.row([(ever[operation], 1), (keep[k, value], -1), (ever[graph.maker[value]], -1)], 0)


def needed_after(graph: Graph, moment: int) -> np.ndarray:
    """(operations,) bool: operations after `moment`, and earlier ones that may have to be recomputed for them."""
    relevant = np.zeros(len(graph.seconds), bool)
    relevant[moment + 1:] = True
    for operation in range(len(relevant) - 1, -1, -1):
        if relevant[operation]:
            relevant[[graph.maker[value] for value in graph.reads[operation]]] = True
    return relevant

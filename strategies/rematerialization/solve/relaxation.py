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
import scipy

from strategies.common.highs import mixed_integer
from strategies.rematerialization.solve.graph import Graph

ALWAYS, NEVER = -1, -2


@dataclass(frozen=True, eq=False)
class Program:
    """min cost @ z + constant subject to rows @ z <= limit, z in {0, 1}.

    `keep[k][i]` is the column that says whether value i is resident at moment k (1-based), `run[k][j]` the one that
    says whether operation j runs between moments k and k + 1. Either can be `ALWAYS` or `NEVER` instead of a column.
    """

    moments: tuple[int, ...]
    cost: np.ndarray
    constant: float
    rows: scipy.sparse.csr_array
    limit: np.ndarray
    keep: np.ndarray
    run: np.ndarray

    def solve(self, seconds: float, nodes: int | None = None) -> scipy.optimize.OptimizeResult:
        """HiGHS's answer; its `mip_dual_bound` plus `constant` is the lower bound.

        Costs are solved for in units of the largest one: HiGHS takes a program for solved within 1e-6 of its cost, and
        reports a bound that much too high, which is a share of a percent where operations take microseconds.

        Args:
            seconds: time limit.
            nodes: limit on the branch and bound that, unlike seconds, stops it at the same place every time.
        """
        if not self.cost.size:
            status = 2 if (self.limit < 0).any() else 0
            return scipy.optimize.OptimizeResult(status=status, fun=0.0, mip_dual_bound=0.0, x=np.zeros(0))
        unit = float(self.cost.max()) or 1.0
        options = {"mip_rel_gap": 0.0} | ({} if np.isinf(seconds) else {"time_limit": max(seconds, 0.01)})
        answer = mixed_integer(
            self.cost / unit, constraints=scipy.optimize.LinearConstraint(self.rows, -np.inf, self.limit),
            bounds=scipy.optimize.Bounds(0, 1),
            integrality=np.ones(self.cost.size),
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


def program(graph: Graph, budget: int, moments: Sequence[int]) -> Program:
    """The relaxation of `graph` under `budget` bytes that checks memory at the first runs of `moments`."""
    return _Builder(graph, budget, sorted(moments)).build()


class _Builder:
    def __init__(self, graph: Graph, budget: int, moments: list[int]):
        self.graph, self.budget, self.moments = graph, budget, moments
        self.cost: list[np.ndarray] = []
        self.columns, self.count = 0, 0
        self.entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.limits: list[np.ndarray] = []
        self.once = np.isin(np.arange(len(graph.seconds)), list(graph.once))
        self.held = np.isin(np.arange(len(graph.maker)), list(graph.held))
        self.seconds, self.size = np.asarray(graph.seconds, float), np.asarray(graph.size, float)
        self.maker = np.asarray(graph.maker, np.int64)
        self.reader = np.repeat(np.arange(len(graph.reads)), [len(read) for read in graph.reads])
        self.read = np.array([value for read in graph.reads for value in read], np.int64)

    def add_columns(self, cost: np.ndarray) -> np.ndarray:
        """New columns, one for each of the costs."""
        self.cost.append(cost)
        self.columns += len(cost)
        return np.arange(self.columns - len(cost), self.columns)

    def add_rows(self, columns: np.ndarray, factors: Sequence[float] | np.ndarray, limit: float = 0.0) -> None:
        """Add a row sum factor * column <= limit for each of (rows, terms) columns, which may be ALWAYS (1) or NEVER.

        Rows that hold anyway are left out.
        """
        factor = np.broadcast_to(np.asarray(factors, float), columns.shape)
        limits = limit - np.where(columns == ALWAYS, factor, 0.0).sum(1)
        real = columns >= 0
        needed = (limits < 0) | (real & (factor > 0)).any(1)
        number = np.full(len(columns), -1)
        number[needed] = self.count + np.arange(int(needed.sum()))
        where = real & needed[:, None]
        self.entries.append((np.broadcast_to(number[:, None], columns.shape)[where], columns[where], factor[where]))
        self.limits.append(limits[needed])
        self.count += int(needed.sum())

    def build(self) -> Program:
        """The program."""
        graph, count = self.graph, len(self.moments)
        operations, values = len(graph.seconds), len(graph.maker)
        self.keep = np.full((count + 1, values), NEVER)
        self.run = np.full((count + 1, operations), NEVER)
        self.run[0, : self.moments[0]] = ALWAYS
        makes = graph.makes
        for k, moment in enumerate(self.moments, start=1):
            relevant = needed_after(graph, moment)
            self.keep_at(k, moment, relevant)
            self.keep[k, list(makes[moment])] = ALWAYS
            self.run_between(k, moment, self.moments[k] if k < count else operations, relevant)
        for k in range(1, count):
            self.run_after(k, self.moments[k - 1])
        row, column, factor = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        cost = np.concatenate(self.cost) if self.cost else np.zeros(0)
        rows = scipy.sparse.csr_array((factor, (row, column)), shape=(self.count, self.columns))
        limit = np.concatenate(self.limits)
        return Program(tuple(self.moments), cost, float(self.seconds.sum()), rows, limit, self.keep, self.run)

    def keep_at(self, k: int, moment: int, relevant: np.ndarray) -> None:
        """What may be resident at moment k, what must be, and that it fits."""
        graph, useful = self.graph, np.zeros(len(self.graph.maker), bool)
        useful[self.read[relevant[self.reader]]] = True
        before = self.maker < moment
        must = self.held.copy()
        must[list(graph.reads[moment])] = True
        self.keep[k, before & must] = ALWAYS
        chosen = np.flatnonzero(before & ~must & useful)
        self.keep[k, chosen] = self.add_columns(np.zeros(len(chosen)))
        there = np.flatnonzero(before & (must | useful))
        terms = np.stack([self.keep[k, there], self.keep[k - 1, there], self.run[k - 1, self.maker[there]]], 1)
        self.add_rows(terms, (1, -1, -1))
        made = sum(int(graph.size[value]) for value in graph.makes[moment])
        self.add_rows(self.keep[k, there][None], self.size[there],
                      self.budget - graph.fixed - int(graph.workspace[moment]) - made)

    def run_between(self, k: int, moment: int, after: int, relevant: np.ndarray) -> None:
        """What may run between moment k and the next, what must, and that its inputs are available."""
        self.run[k, moment + 1:after] = ALWAYS
        again = np.flatnonzero(relevant[:moment + 1] & ~self.once[:moment + 1])
        self.run[k, again] = self.add_columns(self.seconds[again])
        self.need(k, self.run[k], np.arange(len(relevant)) < after)

    def need(self, k: int, runs: np.ndarray, which: np.ndarray) -> None:
        """What runs after moment k reads what is there at moment k or made by what runs after it."""
        edge = np.flatnonzero(which[self.reader] & (runs[self.reader] != NEVER))
        value = self.read[edge]
        self.add_rows(np.stack([runs[self.reader[edge]], self.keep[k, value], runs[self.maker[value]]], 1), (1, -1, -1))

    def run_after(self, k: int, moment: int) -> None:
        """What runs at any time after moment k, counted once, satisfies the program of moment k alone.

        This is implied for integers, and makes the linear relaxation at least as strong as that of every single moment.
        It is not otherwise: fractional reruns in several intervals could all rely on the same fractionally kept value.
        """
        ever = np.full(len(self.graph.seconds), NEVER)
        ever[moment + 1:] = ALWAYS
        some = np.flatnonzero((self.run[k:, :moment + 1] >= 0).any(0))
        ever[some] = self.add_columns(np.zeros(len(some)))
        terms = np.concatenate([ever[some][:, None], self.run[k:, some].T], 1)
        self.add_rows(terms, (1, *[-1] * (terms.shape[1] - 1)))
        self.need(k, ever, np.ones(len(ever), bool))


def needed_after(graph: Graph, moment: int) -> np.ndarray:
    """(operations,) bool: operations after `moment`, and earlier ones that may have to be recomputed for them."""
    relevant = np.zeros(len(graph.seconds), bool)
    relevant[moment + 1:] = True
    for operation in range(len(relevant) - 1, -1, -1):
        if relevant[operation]:
            relevant[[graph.maker[value] for value in graph.reads[operation]]] = True
    return relevant

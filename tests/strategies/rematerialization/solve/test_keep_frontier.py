"""The frontier of bytes kept against recomputation, compared with every set of values that can be kept."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from strategies.rematerialization.solve import keep_frontier as module
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.keep_frontier import keep_frontier
from strategies.rematerialization.solve.relaxation import Program
from tests.strategies.rematerialization.solve.test_solver import random_graph


def every_choice(graph: Graph, moment: int) -> list[tuple[int, float]]:
    """(bytes, seconds) of every set of values kept at the moment, beside what the moment reads and makes."""
    makes = graph.makes
    own = {*graph.reads[moment], *makes[moment]}
    before = [value for value, maker in enumerate(graph.maker) if maker < moment and value not in own]
    must = [value for value in before if value in graph.held]
    free = [value for value in before if value not in graph.held]
    found = []
    for count in range(len(free) + 1):
        for chosen in combinations(free, count):
            seconds = again(graph, moment, {*chosen, *must} | own)
            if seconds is not None:
                found.append((int(sum(graph.size[value] for value in (*chosen, *must))), seconds))
    return found


def again(graph: Graph, moment: int, there: set[int]) -> float | None:
    """Seconds of what has to run again after the moment; None if something that may run only once has to."""
    rerun: set[int] = set()
    stack = list(range(moment + 1, len(graph.seconds)))
    while stack:
        for value in graph.reads[stack.pop()]:
            maker = int(graph.maker[value])
            if value not in there and maker < moment and maker not in rerun:
                rerun.add(maker)
                stack.append(maker)
            elif value not in there and maker == moment:
                raise AssertionError("the moment's own values are there")
    return None if rerun & graph.once else float(sum(graph.seconds[operation] for operation in rerun))


@pytest.mark.parametrize("seed", range(24))
def test_no_choice_lies_below_the_lines_and_the_corners_lie_on_them(seed):
    graph = random_graph(seed, forward=5, rich=seed % 3 > 0)
    moment = graph.forward
    frontier = keep_frontier(graph, moment)
    choices = every_choice(graph, moment)
    for price, level in frontier.lines:
        assert level <= min(seconds + price * count for count, seconds in choices) + 1e-9
    for count in range(min(count for count, _ in choices), max(count for count, _ in choices) + 1):
        bound = max(level - price * count for price, level in frontier.lines)
        assert bound <= min(seconds for kept, seconds in choices if kept <= count) + 1e-9
    for order in frontier.orders:
        simulate(graph, order)  # raises if it cannot run
    prices = np.linspace(0.1, 3, 30)
    best = [min(seconds + price * count for count, seconds in choices) for price in prices]
    known, levels = np.array(frontier.lines).T
    assert np.all(np.interp(prices, known, levels)[prices <= known[-1]] <= np.array(best)[prices <= known[-1]] + 1e-9)
    extra = sorted(simulate(graph, order).seconds - graph.seconds.sum() for order in frontier.orders)
    fewest = min(count for count, _ in choices)
    assert extra[0] == 0 and extra[-1] == min(seconds for count, seconds in choices if count == fewest)


def test_out_of_time_it_proves_nothing_and_keeps_everything(monkeypatch):
    graph = random_graph(1, forward=5)
    monkeypatch.setattr(module, "LONGEST", 0.0)
    frontier = keep_frontier(graph, graph.forward)
    assert frontier.lines == ((0.0, 0.0),) and not frontier.whole
    for order in frontier.orders:
        simulate(graph, order)


@pytest.mark.parametrize("solved", range(1, 4))
def test_programs_that_are_not_solved_leave_lines_that_hold(monkeypatch, solved):
    real, calls = Program.solve, []

    def some(self, seconds, nodes=None):
        calls.append(seconds)
        unsolved = OptimizeResult(status=1, fun=None, mip_dual_bound=-np.inf, x=None)
        return real(self, seconds, nodes) if len(calls) <= solved else unsolved

    monkeypatch.setattr(Program, "solve", some)
    graph = random_graph(7, forward=6)
    frontier = keep_frontier(graph, graph.forward)
    assert len(calls) > solved and all(0 < seconds <= module.LONGEST for seconds in calls)
    assert len(frontier.lines) == solved
    for price, level in frontier.lines:
        assert level <= min(seconds + price * count for count, seconds in every_choice(graph, graph.forward)) + 1e-9

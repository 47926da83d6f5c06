"""The greedy repair of orders: what it returns runs, and exceeds the budget by less than before or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.rematerialization.layered_graphs import budget_of, layered
from strategies.rematerialization.solve.annealing_search import arrays
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.relief import relieve
from tests.strategies.rematerialization.solve.test_solver import budgets, chain, random_graph


def excess(graph, order, budget: int) -> int:
    return int(np.maximum(0, simulate(graph, order).resident - budget).sum())


@pytest.mark.parametrize("seed", range(20))
def test_repaired_orders_run_and_need_less(seed):
    graph = random_graph(seed, forward=9, rich=seed % 2 == 0)
    for budget in budgets(graph):
        start = tuple(range(len(graph.seconds)))
        found = relieve(arrays(graph), start, budget, 8 * len(start))
        assert excess(graph, found, budget) <= excess(graph, start, budget)
        assert all(found.count(operation) == 1 for operation in graph.once)
        first = list(dict.fromkeys(found))
        assert first == sorted(first), "first runs stay in the graph's order"


def test_a_chain_and_a_layered_graph_are_made_to_fit():
    for graph, budget in ((chain(30), 14), (layered(60), budget_of(layered(60), 0.9))):
        start = range(len(graph.seconds))
        assert simulate(graph, start).peak > budget
        found = simulate(graph, relieve(arrays(graph), start, budget, 8 * len(graph.seconds)))
        assert found.peak <= budget and found.seconds > graph.seconds.sum()


def test_runs_that_make_several_values_have_room_for_all_copies():
    """Each rerun makes all of an operation's values once more, and compiled code asks for no bounds."""
    forward, outputs = 40, 4
    count = 2 * forward
    made = [operation for operation in range(forward) for _ in range(outputs)] + list(range(forward, count))
    reads = [()] + [tuple(range(outputs * (at - 1), outputs * at)) for at in range(1, forward)]
    for back in range(forward):
        source = forward - 1 - back
        reads.append(tuple(range(outputs * source, outputs * (source + 1)))
                     + ((outputs * forward + back - 1,) if back else ()))
    graph = Graph(np.ones(count), tuple(reads), np.array(made), np.ones(len(made), np.int64),
                  np.zeros(count, np.int64), forward=forward)
    start = tuple(range(count))
    budget = int(0.4 * simulate(graph, start).peak)
    found = relieve(arrays(graph), start, budget, 8 * count)
    assert len(found) > count and excess(graph, found, budget) < excess(graph, start, budget)

"""The rematerialization solver against brute force, the exact program and the simulator, on small graphs."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import OptimizeResult

from benchmarks.rematerialization import instances
from benchmarks.rematerialization.checking import check
from strategies.common import highs
from strategies.rematerialization.solve import baselines, checkmate
from strategies.rematerialization.solve.checkmate import MOST_OPERATIONS, NotExact, exact, linear_bound, optimal
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.lower_bound import Bound
from strategies.rematerialization.solve.relaxation import program
from strategies.rematerialization.solve.solver import Infeasible, least_peak, solve

MOVES = 6000  # of annealing: a few hundredths of a second on these graphs


def brute_force(graph: Graph, budget: int, stages: bool = False) -> float:
    """Least cost over all orders with first runs in the graph's numbering, by Dijkstra over (runs, resident).

    With `stages` only over those of Checkmate's kind: between two first runs, reruns are in the graph's numbering.
    """
    makes, operations = graph.makes, len(graph.seconds)
    size = [int(bytes_) for bytes_ in graph.size]
    best, heap = {((0, -1), frozenset()): 0.0}, [(0.0, 0, (0, -1), frozenset())]
    tie = itertools.count(1)
    while heap:
        cost, _, (ran, latest), there = heapq.heappop(heap)
        if ran == operations:
            return cost
        if cost > best[(ran, latest), there]:
            continue
        for operation in range(latest + 1, ran + 1):
            if not there.issuperset(graph.reads[operation]) or (operation < ran and operation in graph.once):
                continue
            made = set(makes[operation])
            beside = sum(size[value] for value in made & graph.held & there)
            after = there | made
            if graph.fixed + int(graph.workspace[operation]) + beside + sum(size[v] for v in after) <= budget:
                reach = (cost + graph.seconds[operation],
                         (max(ran, operation + 1), operation if stages and operation < ran else -1))
                free = sorted(after - graph.held)
                for count in range(len(free) + 1):
                    for dropped in itertools.combinations(free, count):
                        push(heap, best, tie, *reach, after - set(dropped))
    return np.inf


def push(heap, best, tie, cost: float, ran: tuple[int, int], there: frozenset[int]) -> None:
    if cost < best.get((ran, there), np.inf):
        best[ran, there] = cost
        heapq.heappush(heap, (cost, next(tie), ran, there))


def random_graph(seed: int, forward: int = 3, rich: bool = True) -> Graph:
    """A forward pass and its backward: operation n - 1 - i reads what i read and the gradient of what i made.

    `rich` adds operations that make two values or none, workspace, `once`, `held` and values of size 0.
    """
    draw = np.random.default_rng(seed)
    reads = [()] + [tuple({operation - 1, int(draw.integers(max(0, operation - 3), operation))})
                    for operation in range(1, forward)]
    for operation in reversed(range(forward)):
        gradient = {len(reads) - 1}
        reads.append(tuple({*reads[operation], *gradient} | ({operation} if draw.random() < 0.4 else set())))
    count = len(reads)
    maker, once, held = list(range(count)), set(), set()
    workspace = np.zeros(count, int)
    if rich:
        maker.append(int(draw.integers(forward)))  # a second value of a forward operation, read by a backward one
        reader = int(draw.integers(forward, count))
        reads[reader] = (*reads[reader], count)
        workspace = draw.integers(0, 3, count)
        once = {0} if draw.random() < 0.5 else set()
        held = {int(draw.integers(forward, count - 1))} if draw.random() < 0.5 else set()
    size = draw.integers(0 if rich else 1, 6, len(maker))
    return Graph(draw.integers(0, 9, count).astype(float), tuple(reads), np.array(maker), size, workspace,
                 frozenset(once), frozenset(held), forward, int(draw.integers(3)))


def chain(length: int, seed: int | None = None) -> Graph:
    """A chain of layers and its backward: B_i reads the input of layer i and the gradient of its output."""
    draw = np.random.default_rng(seed)
    reads = [(operation - 1,) if operation else () for operation in range(length)]
    for layer in reversed(range(length)):
        reads.append(tuple({len(reads) - 1, *([layer - 1] if layer else [])}))
    count = 2 * length
    seconds = np.ones(count) if seed is None else draw.integers(1, 9, count).astype(float)
    size = np.ones(count, int) if seed is None else draw.integers(1, 5, count)
    return Graph(seconds, tuple(reads), np.arange(count), size, np.zeros(count, int), forward=length)


def budgets(graph: Graph) -> range:
    """Budgets between what no order can do without and keeping everything."""
    low, high = least_peak(graph, 10, iterations=MOVES).bound, simulate(graph, baselines.keep_all(graph)).peak
    return range(low, high + 1, max(1, (high - low) // 3))


@pytest.mark.parametrize("seed", range(12))
def test_brute_force_agrees(seed):
    graph = random_graph(seed)
    for budget in budgets(graph):
        optimum = brute_force(graph, budget)
        if np.isinf(optimum):
            with pytest.raises(Infeasible):
                solve(graph, budget, 5, iterations=MOVES)
            continue
        found = solve(graph, budget, 5, iterations=MOVES)
        assert found.seconds == optimum
        assert found.bound <= optimum
        assert check(graph, found.order) == (found.seconds, found.peak)
        assert found.peak <= budget


@pytest.mark.parametrize("seed", range(12))
def test_the_exact_program_is_brute_force_over_its_kind_of_orders(seed):
    graph = random_graph(seed)
    for budget in budgets(graph):
        found = optimal(graph, budget)
        assert (np.inf if found.seconds is None else found.seconds) == pytest.approx(brute_force(graph, budget, True))
        assert found.order is None or check(graph, found.order)[1] <= budget


def test_the_exact_program_refuses_what_it_cannot_manage(monkeypatch):
    large = chain(1 + MOST_OPERATIONS // 2)
    with pytest.raises(NotExact, match=f"the graph with its {len(large.seconds)} operations is too large .* at most"):
        optimal(large, 100)
    monkeypatch.setattr(checkmate, "PROOF", 1e-4)
    graph = chain(MOST_OPERATIONS // 2, 0)
    with pytest.raises(NotExact, match="was not solved to a proven optimum within 0 s"):
        optimal(graph, least_peak(graph, 10, iterations=MOVES).peak)


def test_the_second_simulator_refuses_what_cannot_run():
    graph = random_graph(0)
    order = list(range(len(graph.seconds)))
    assert check(graph, order) == (simulate(graph, order).seconds, simulate(graph, order).peak)
    with pytest.raises(ValueError, match="never runs"):
        check(graph, order[:-1])
    with pytest.raises(ValueError, match="gone by then"):
        check(graph, [order[-1], *order[:-1]])


@pytest.mark.parametrize("seed", range(30))
def test_not_worse_than_the_exact_program(seed):
    graph = random_graph(seed, forward=5, rich=seed % 2 == 0)
    for budget in list(budgets(graph))[1:3]:
        reference = exact(graph, budget, 30)
        if reference.status == "infeasible":
            continue
        assert reference.status == "optimal"
        outcome = simulate(graph, reference.order)
        assert outcome.peak <= budget and outcome.seconds == pytest.approx(reference.seconds)
        found = solve(graph, budget, 5, iterations=MOVES)
        assert found.bound <= found.seconds <= reference.seconds + 1e-6
        assert linear_bound(graph, budget) <= reference.seconds + 1e-6


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_values_computed_three_times(seed):
    graph = chain(7, seed)
    least = least_peak(graph, 10, iterations=20_000)
    found = solve(graph, least.peak, 10, iterations=20_000)
    assert max(found.order.count(operation) for operation in range(graph.forward)) >= 3
    reference = exact(graph, least.peak, 60)
    assert found.seconds == pytest.approx(reference.seconds)
    assert found.bound <= reference.seconds + 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_more_moments_never_prove_too_much(seed):
    graph = random_graph(seed, forward=4)
    for budget in budgets(graph):
        prover = Bound(graph, budget)
        if np.isfinite(prover.value):
            prover.first(np.inf)
            one = prover.value
            prover.tighten(np.inf)
            assert prover.value >= one
        assert prover.value <= brute_force(graph, budget)


def test_moments_that_an_order_violates_are_looked_at_together():
    """Where a single moment's program allows too much, the moments that its order needs most at raise the bound."""
    raised = 0
    for seed in range(40):
        graph = random_graph(seed, forward=6, rich=False)
        for budget in list(budgets(graph))[1:3]:
            prover = Bound(graph, budget)
            prover.first(np.inf)
            one = prover.value
            prover.tighten(np.inf)
            raised += prover.value > one
            every = Bound(graph, budget)
            every.prove(program(graph, budget, range(len(graph.seconds))), np.inf)
            assert prover.value <= every.value
            if np.isfinite(prover.value):
                assert prover.worst(prover.order) is None and prover.value == every.value, "few moments are enough"
                assert len(prover.moments) < len(graph.seconds)
    assert raised > 10


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_where_operations_take_no_time_to_speak_of(seed):
    """HiGHS stops within 1e-6 of a cost, whatever the cost is."""
    graph = random_graph(seed, forward=5)
    bounds = []
    for unit in (1.0, 1e-8):
        scaled = replace(graph, seconds=(np.asarray(graph.seconds) + 0.123) * unit)
        bound = Bound(scaled, budgets(graph)[len(budgets(graph)) // 2])
        bound.first(np.inf)
        bound.tighten(np.inf)
        bounds.append(bound.value / unit)
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)


def test_workspace_of_a_moment_limits_what_is_kept():
    graph = chain(6)
    operations, moment = len(graph.seconds), graph.forward
    reads = (*graph.reads[:moment], (), *graph.reads[moment:])  # it makes no value, between the two passes
    workspace = np.zeros(operations + 1, int)
    workspace[moment] = 100
    free = Graph(np.insert(graph.seconds, moment, 0.0), reads, graph.maker + (graph.maker >= moment), graph.size,
                 workspace, forward=moment + 1)
    assert solve(free, 106, 5, iterations=MOVES).seconds == operations
    tight = solve(free, 103, 5, iterations=MOVES)
    assert tight.seconds > operations
    at = tight.order.index(moment)
    assert simulate(free, tight.order).resident[at] <= 103


def test_once_and_held_are_honored():
    graph = chain(6, seed=3)
    plain = solve(graph, least_peak(graph, 5, iterations=MOVES).peak, 5, iterations=MOVES)
    again = next(operation for operation in range(1, 6) if plain.order.count(operation) > 1)
    once = replace(graph, once=frozenset({again}))
    order = solve(once, least_peak(once, 5, iterations=MOVES).peak, 5, iterations=MOVES).order
    assert order.count(again) == 1
    held = replace(graph, held=frozenset({7}))
    least = least_peak(held, 5, iterations=MOVES)
    assert simulate(held, least.order).resident[-1] >= graph.size[7] + graph.size[-1]
    assert least.bound <= least.peak


def test_infeasible_says_what_would_fit():
    graph = chain(5)
    with pytest.raises(Infeasible, match="least peak found is 3 bytes, and none is below 3 bytes") as raised:
        solve(graph, 2, 1)
    assert simulate(graph, raised.value.order).peak == raised.value.peak == 3


def test_same_seed_same_order():
    graph = random_graph(5, forward=12)
    budget = (least_peak(graph, 5, iterations=MOVES).peak + simulate(graph, baselines.keep_all(graph)).peak) // 2
    first, second = (solve(graph, budget, 5, seed=7, iterations=MOVES) for _ in range(2))
    assert first.order == second.order


def test_a_given_start_is_used_and_checked():
    graph = chain(30)
    start = baselines.chen_sqrt(graph)
    outcome = simulate(graph, start)
    assert solve(graph, outcome.peak, 1, start=start, iterations=1).seconds <= outcome.seconds
    with pytest.raises(ValueError, match="never run"):
        solve(graph, 100, 1, start=start[:-1])


def test_baselines_are_orders_that_save_memory():
    graph = chain(36)
    everything = simulate(graph, baselines.keep_all(graph))
    chen = simulate(graph, baselines.chen_sqrt(graph))
    assert everything.seconds == 72 and chen.peak < 16 < everything.peak
    assert 72 < chen.seconds <= 72 + 36
    blocks = simulate(graph, baselines.per_block(graph, [11, 23]))
    assert chen.peak < blocks.peak < everything.peak
    budget = (everything.peak + chen.peak) // 2
    assert simulate(graph, baselines.greedy(graph, budget)).peak <= budget
    assert baselines.greedy(graph, 3) is None
    for seed in range(6):
        other = random_graph(seed, forward=8)
        for rule in (baselines.keep_all, baselines.chen_sqrt, baselines.per_block):
            simulate(other, rule(other))


def small_file(folder, runs) -> object:
    graph = chain(8, seed=1)
    edges = [[read, operation] for operation, reads in enumerate(graph.reads) for read in reads]
    file = folder / "graphs.json"
    file.write_text(json.dumps({"small": {
        "T": 16, "loss": 7, "cpu_10us": graph.seconds.astype(int).tolist(),
        "ram_KB": (graph.size * 2**20).tolist(), "fixed_ram_KB": 2**20, "edges": edges, "runs": runs}}))
    return file


def test_instances_command(tmp_path, capsys):
    file, out = small_file(tmp_path, {"14": {"objective_10us": 9999}, "13": {}, "3": {}}), tmp_path / "rows.json"
    assert instances.main([str(file), "--seconds", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["budget_GB"] for row in rows] == [14, 13, 3]
    for row in rows[:2]:
        assert list(row)[:7] == ["graph", "budget_GB", "objective", "peak_KB", "bound", "gap", "seconds"]
        assert row["bound"] <= row["objective"] and row["peak_KB"] <= row["budget_GB"] * 2**20
        assert row["gap"] == pytest.approx((row["objective"] - row["bound"]) / row["objective"])
    assert rows[2]["objective"] is None and rows[2]["peak_KB"] >= rows[2]["least_KB"] > 3 * 2**20
    printed = capsys.readouterr().out
    assert "small" in printed and "nothing fits" in printed


def one_node(**changes) -> str:
    entry = {"T": 1, "loss": 0, "cpu_10us": [1], "ram_KB": [1], "fixed_ram_KB": 0, "edges": [], "runs": {"1": {}}}
    return json.dumps({"a": entry | changes})


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read"), ("{", "is not JSON"), ("[]", "has no graphs"), ('{"a": {"T": 3}}', "'a' lacks loss"),
    (one_node(edges=[[0, 0]]), "edges that do not go"), (one_node(runs={"x": {}}), "no positive number of GB"),
    (one_node(runs={}), "no budgets"), (one_node(ram_KB=["a"]), "other than numbers"), (one_node(loss=1), "loss 1"),
])
def test_instances_command_on_a_bad_file(tmp_path, capsys, text, message):
    file = tmp_path / "graphs.json"
    if text is not None:
        file.write_text(text)
    assert instances.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_native_code_of_the_solver_writes_nothing_to_standard_output(capfd, monkeypatch):
    def talkative(cost, **program):
        os.write(1, b"HighsMipSolverData::for developers\n")
        return OptimizeResult(status=0)

    monkeypatch.setattr(scipy.optimize, "milp", talkative)
    print("a table")
    assert highs.mixed_integer(np.zeros(1)).status == 0
    print("goes on")
    captured = capfd.readouterr()
    assert captured.out == "a table\ngoes on\n" and "for developers" in captured.err

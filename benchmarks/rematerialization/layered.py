"""Random layered graphs of 100 to 1,000 nodes: the solver and, where OR-Tools is, CP-SAT on the interval formulation.

    python -m benchmarks.rematerialization.layered [--nodes 100 250 500 1000] [--seconds 10] [--peer] [--json FILE]

Graphs are made from a seed (`layered_graphs`), and the budget is a share of the peak of running everything once. `gap`
is (cost - bound) / cost, `cost` and `bound` are in the graph's unit, and every order is checked by a second simulator.
The peer is Bartan et al. 2023 (Moccasin): up to two intervals of residence for every node, on the event grid of stages.
Both take turns and get the same wall time on all cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.rematerialization.checking import check
from benchmarks.rematerialization.frontier import machine
from benchmarks.rematerialization.layered_graphs import budget_of, layered
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.solver import Infeasible, solve

MARGIN = 0.03  # of the time, left for what comes after the solver


def main(arguments: list[str] | None = None) -> int:
    """Solve every graph, print a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 250, 500, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="wall time for each graph and solver")
    parser.add_argument("--share", type=float, default=0.8, help="budget as a share of the peak of keeping everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="also solve with CP-SAT, which OR-Tools has")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    solve(layered(30), budget_of(layered(30)), 0.5, iterations=500)  # compiles, which counts for no graph
    rows = []
    for nodes in options.nodes:
        graph = layered(nodes, options.seed)
        row = ours(graph, budget_of(graph, options.share), options.seconds, options.seed)
        if options.peer:
            row |= {"peer": interval_formulation(graph, row["budget"], options.seconds)}
        rows.append(row)
        print(line(row), flush=True)
    if options.json:
        written = {"machine": machine("cpu"), "share": options.share, "seed": options.seed, "seconds": options.seconds,
                   "graphs": rows}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def ours(graph: Graph, budget: int, seconds: float, seed: int) -> dict:
    """The solver's row for one graph."""
    row = {"nodes": len(graph.seconds), "edges": sum(map(len, graph.reads)), "budget": budget,
           "once": float(graph.seconds.sum())}
    began = time.perf_counter()
    try:
        found = solve(graph, budget, seconds * (1 - MARGIN), seed)
    except Infeasible as error:
        return row | {"cost": None, "bound": None, "gap": None, "peak": error.peak,
                      "seconds": round(time.perf_counter() - began, 2)}
    took = round(time.perf_counter() - began, 2)
    assert check(graph, found.order) == (found.seconds, found.peak) and found.peak <= budget
    return row | {"cost": found.seconds, "bound": found.bound, "gap": found.gap, "peak": found.peak, "seconds": took}


def interval_formulation(graph: Graph, budget: int, seconds: float, copies: int = 2) -> dict:
    """CP-SAT's cost and bound (None where it has none) with up to `copies` intervals for every node.

    Node v can run as event t (t + 1) / 2 + v of any stage t from v on; its first run is the last event of stage v.
    """
    cp = importlib.import_module("ortools.sat.python.cp_model")
    model, nodes = cp.CpModel(), len(graph.seconds)
    event = [[stage * (stage + 1) // 2 + node for stage in range(node, nodes)] for node in range(nodes)]
    last = nodes * (nodes + 1) // 2
    starts, ends, there, intervals = [], [], [], []
    for node in range(nodes):
        begin = [model.new_constant(event[node][0])] + [model.new_int_var_from_domain(
            cp.Domain.from_values(event[node]), "") for _ in range(copies - 1)]
        stop = [model.new_int_var(0, last, "") for _ in range(copies)]
        runs = [model.new_constant(1)] + [model.new_bool_var("") for _ in range(copies - 1)]
        for k in range(copies):
            size = model.new_int_var(1, last, "")
            intervals.append(model.new_optional_interval_var(begin[k], size, stop[k], runs[k], ""))
            if k:
                model.add(stop[k - 1] <= begin[k]).only_enforce_if(runs[k])
                model.add_implication(runs[k], runs[k - 1])
        starts.append(begin)
        ends.append(stop)
        there.append(runs)
    model.add_cumulative(intervals, [int(size) for size in graph.size for _ in range(copies)], budget - graph.fixed)
    for node, read in enumerate(graph.reads):
        for k in range(copies):
            for value in read:
                served = []
                for other in range(copies):
                    serves = model.new_bool_var("")
                    model.add(starts[value][other] < starts[node][k]).only_enforce_if(serves)
                    model.add(ends[value][other] > starts[node][k]).only_enforce_if(serves)
                    model.add_implication(serves, there[value][other])
                    served.append(serves)
                model.add_bool_or([*served, ~there[node][k]] if k else served)
    model.minimize(sum(int(graph.seconds[node]) * there[node][k] for node in range(nodes) for k in range(copies)))
    solver = cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = max(2, machine_cores())
    began = time.perf_counter()
    status = solver.solve(model)
    found = status in (cp.OPTIMAL, cp.FEASIBLE)
    if found:
        runs = sorted((solver.value(starts[node][k]), node) for node in range(nodes) for k in range(copies)
                      if solver.value(there[node][k]))
        assert simulate(graph, [node for _, node in runs]).peak <= budget
    return {"name": f"OR-Tools {importlib.import_module('ortools').__version__} CP-SAT",
            "cost": solver.objective_value if found else None, "bound": solver.best_objective_bound,
            "seconds": round(time.perf_counter() - began, 2)}


def machine_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def line(row: dict) -> str:
    """One row as text."""
    found = "nothing fits" if row["cost"] is None else (
        f"cost {row['cost']:.0f}, {row['cost'] / row['once'] - 1:.2%} more than once; bound {row['bound']:.0f}, gap "
        f"{row['gap']:.3%}")
    text = f"{row['nodes']:5} nodes, {row['edges']:5} edges: {found} in {row['seconds']} s"
    if "peer" in row:
        peer = row["peer"]
        text += f"; {peer['name']}: " + ("nothing" if peer["cost"] is None else (
            f"cost {peer['cost']:.0f}, bound {peer['bound']:.0f}")) + f" in {peer['seconds']} s"
    return text


if __name__ == "__main__":
    sys.exit(main())

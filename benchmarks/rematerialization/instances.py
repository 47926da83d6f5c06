"""Rematerialization of recorded training graphs: the solver and simple rules at every budget.

    python -m benchmarks.rematerialization.instances FILE.json [--seconds 60] [--seed 0] [--json OUT]

FILE.json is `{graph: {T, loss, cpu_10us[T], ram_KB[T], fixed_ram_KB, edges[[u, v]], runs{budget_GB: {...}}}}`: node v
reads the output of u for every edge; nodes after `loss` are the backward pass. 1 GB is 2^20 KB. A run may hold
`objective_10us` and `gurobi_bound`, what the Checkmate program reached on Gurobi, which are then printed beside.

Every schedule is checked by a second simulator (`benchmarks.rematerialization.checking`), whose figures are printed,
against the solver's own (`strategies.rematerialization.solve.graph`). `gap` is (objective - bound) /
objective; `seconds` is all the wall time a budget took, rules included; `objective` is null where nothing fits, and
then `peak_KB` is the least peak found and `least_KB` what no schedule can do without.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.rematerialization.checking import check
from strategies.rematerialization.solve import baselines
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.solver import Infeasible, solve

KB_PER_GB = 2**20
RULES = ("keep_all", "chen_sqrt", "per_block", "greedy")
MARGIN = 0.03  # of the time, left for what comes after the solver


def main(arguments: list[str] | None = None) -> int:
    """Solve every budget of the file, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="wall time for each budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        instances = read(options.file)
    except ValueError as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    rows = []
    for name, (graph, runs) in instances.items():
        for budget in sorted(runs, key=float, reverse=True):
            rows.append(one(name, graph, budget, runs[budget], options.seconds, options.seed))
            print(("" if len(rows) > 1 else HEADER + "\n") + line(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def one(name: str, graph: Graph, budget: str, run: dict, seconds: float, seed: int) -> dict:
    """The row of one budget."""
    began = time.perf_counter()
    kilobytes = int(float(budget) * KB_PER_GB)
    rules = {rule: cost(graph, rule, kilobytes) for rule in RULES}
    left = seconds * (1 - MARGIN) - (time.perf_counter() - began)
    row, least = {"graph": name, "budget_GB": float(budget)}, {}
    try:
        found = solve(graph, kilobytes, left, seed)
        objective, peak = check(graph, found.order)
        assert (objective, peak) == (found.seconds, found.peak) and peak <= kilobytes, "the solver's figures are wrong"
        row |= {"objective": objective, "peak_KB": peak, "bound": found.bound, "gap": found.gap}
    except Infeasible as error:
        row |= {"objective": None, "peak_KB": error.peak, "bound": None, "gap": None}
        least = {"least_KB": error.bound}
    row |= {"seconds": round(time.perf_counter() - began, 2), **least,
            "once": float(graph.seconds.sum()), "gurobi": run.get("objective_10us"),
            "gurobi_bound": run.get("gurobi_bound"), "gurobi_seconds": run.get("solve_s")}
    return row | rules


def cost(graph: Graph, rule: str, budget: int) -> float | None:
    """What a rule's order costs, None if it does not fit."""
    order = baselines.greedy(graph, budget) if rule == "greedy" else getattr(baselines, rule)(graph)
    outcome = None if order is None else simulate(graph, order)
    return outcome.seconds if outcome and outcome.peak <= budget else None


def read(file: Path) -> dict[str, tuple[Graph, dict[str, dict]]]:
    """The graphs of a file, with their runs by budget.

    Raises:
        ValueError: the file is missing or not of this format; one line says why.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(content, dict) or not content:
        raise ValueError("has no graphs: expected {name: {T, loss, cpu_10us, ram_KB, fixed_ram_KB, edges, runs}}")
    return {name: (graph_of(name, entry), runs_of(name, entry)) for name, entry in content.items()}


def graph_of(name: str, entry: dict) -> Graph:
    """One entry as a graph whose node v makes value v."""
    if not isinstance(entry, dict):
        raise ValueError(f"graph {name!r} is not an object")
    missing = [key for key in ("T", "loss", "cpu_10us", "ram_KB", "fixed_ram_KB", "edges") if key not in entry]
    if missing:
        raise ValueError(f"graph {name!r} lacks {', '.join(missing)}")
    try:
        nodes, loss = int(entry["T"]), int(entry["loss"])
        seconds, size = np.array(entry["cpu_10us"], np.float64), np.array(entry["ram_KB"], np.int64)
        edges = np.array(entry["edges"], np.int64).reshape(-1, 2)
        fixed = int(entry["fixed_ram_KB"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"graph {name!r} holds something other than numbers ({error})") from None
    if not (len(seconds) == len(size) == nodes > 0 and 0 <= loss < nodes):
        raise ValueError(f"graph {name!r} has T = {nodes} and loss {loss}, but {len(seconds)} costs and {len(size)} "
                         f"sizes")
    if not np.isfinite(seconds).all() or (seconds < 0).any() or (size < 0).any() or fixed < 0:
        raise ValueError(f"graph {name!r} has costs or sizes that are negative or not finite")
    if len(edges) and not ((edges[:, 0] >= 0) & (edges[:, 0] < edges[:, 1]) & (edges[:, 1] < nodes)).all():
        raise ValueError(f"graph {name!r} has edges that do not go from a node to a later one of its {nodes}")
    reads: list[set[int]] = [set() for _ in range(nodes)]
    for source, reader in edges.tolist():
        reads[reader].add(source)
    return Graph(seconds, tuple(tuple(sorted(read)) for read in reads), np.arange(nodes), size,
                 np.zeros(nodes, np.int64), forward=loss + 1, fixed=fixed)


def runs_of(name: str, entry: dict) -> dict[str, dict]:
    """The runs of one entry by budget; a list of budgets or numbers in place of runs will do."""
    runs = entry.get("runs", entry.get("budgets_GB"))
    if isinstance(runs, list):
        runs = {str(budget): {} for budget in runs}
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f"graph {name!r} has no budgets under 'runs'")
    try:
        valid = all(np.isfinite(float(budget)) and float(budget) > 0 for budget in runs)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"graph {name!r} has a budget that is no positive number of GB: {', '.join(runs)}")
    return {budget: run if isinstance(run, dict) else {} for budget, run in runs.items()}


HEADER = (f"{'graph':20} {'GB':>5} {'objective':>10} {'bound':>10} {'gap %':>6} {'s':>5} {'peak GB':>8} "
          f"{'Gurobi':>8} {'its bound':>9} {'keep all':>9} {'sqrt(n)':>9} {'blocks':>9} {'greedy':>9}")


def line(row: dict) -> str:
    """One row of the table; a dash where there is no figure."""
    def show(value: float | None, width: int, digits: int = 0) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    gap = None if row["gap"] is None else 100 * row["gap"]
    rules = " ".join(show(row[rule], 9) for rule in RULES)
    least = f"  nothing fits: below {row['least_KB'] / KB_PER_GB:.3f} GB nothing can" if "least_KB" in row else ""
    return (f"{row['graph'][:20]:20} {row['budget_GB']:5g} {show(row['objective'], 10)} {show(row['bound'], 10)} "
            f"{show(gap, 6, 3)} {row['seconds']:5.1f} {row['peak_KB'] / KB_PER_GB:8.3f} {show(row['gurobi'], 8)} "
            f"{show(row['gurobi_bound'], 9)} {rules}{least}")


if __name__ == "__main__":
    sys.exit(main())

"""Puts the tables of `benchmarks/results/` into the documents: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.adapters import table as adapters_table
from benchmarks.architectures.table import table as architectures_table
from benchmarks.distillation.cached import table as cached_table
from benchmarks.distillation.losses import errors_table, side_by_side
from benchmarks.distillation.peers_quality import table as peers_table
from benchmarks.distillation.students import table as students_table
from benchmarks.end_to_end.end_to_end_table import table as end_to_end_table
from benchmarks.faults.cost import table as cost_table
from benchmarks.faults.judging import table as faults_table
from benchmarks.figures import FILES as FIGURES
from benchmarks.figures import table as figures_table
from benchmarks.generation import table as generation_table
from benchmarks.judged_on_tasks import table as judged_table
from benchmarks.planning_time import table as planning_time_table
from benchmarks.pruning.bytes_on_disk import table as sparse_bytes_table
from benchmarks.pruning.early_exit import table as early_exit_table
from benchmarks.pruning.fiftieth import CUTS as FIFTIETH
from benchmarks.pruning.fiftieth import table as fiftieth_table
from benchmarks.pruning.healing import table as healing_table
from benchmarks.pruning.language_curve import table as language_curve_table
from benchmarks.pruning.layer_errors import table as pruned_layers_table
from benchmarks.pruning.one_shot import table as pruned_once_table
from benchmarks.pruning.structured import table as cuts_table
from benchmarks.quantization.bit_allocation import table as allocation_table
from benchmarks.quantization.runtimes import table as runtimes_table
from benchmarks.quantization.trained_quantized import costs_table, losses_table
from benchmarks.quickstart import table as quickstart_table
from benchmarks.rematerialization.overhead import table as overhead_table
from benchmarks.sharding.bytes_by_engine import table as ledger_table
from benchmarks.sharding.engines import table as engines_table
from benchmarks.sharding.scale import growth_table
from benchmarks.sharding.scale import table as scale_table
from benchmarks.start import table as start_table
from benchmarks.tasks.classification import SHAPES
from benchmarks.tasks.classification import table as classification_table

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- python -m benchmarks\.tables (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def frontier_table(rows: list[dict]) -> str:
    """For each model, plans at a few budgets beside the peers: peak and step time against keeping everything."""
    lines = ["| model | plans, measured peak in MB (step time) | peers, measured peak in MB (step time; a plan's in as "
             "many bytes) |", "|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        plans = [row for row in own if row["method"] == "limbeck" and "beside" not in row]
        beside = {row["beside"]: row for row in own if "beside" in row}
        keep = next(row for row in own if row["method"] == "keep_all")
        peers = [row for row in own if row["method"] not in ("limbeck", "keep_all")]
        shown = ", ".join(_figure(row) for row in plans[::2])
        others = ", ".join(f"{row['method']} {_figure(row, beside.get(row['method']))}{_wrong(row)}" for row in peers)
        lines.append(f"| {model} | keep all {_figure(keep)}; {shown} | {others} |")
    plans = [row for row in rows if row["method"] == "limbeck"]
    over = sum(row["measured_peak"] > row["budget_bytes"] for row in plans)
    worst = max(abs(row["predicted_peak"] / row["measured_peak"] - 1) for row in plans)
    lines.append(f"\nOf {len(plans)} plans {over} measured over their budget; predictions are within {worst:.2%}. "
                 "(!): gradients differ from keep-all's, because dropout is drawn again.")
    return "\n".join(lines)


def _figure(row: dict, beside: dict | None = None) -> str:
    ours = "" if beside is None else f"; x{beside['time_ratio']:.2f}"
    return f"{row['measured_peak'] / 1e6:.1f} (x{row['time_ratio']:.2f}{ours})"


def _wrong(row: dict) -> str:
    return " (!)" if row.get("gradient_difference", 0) > 1e-2 else ""


def instances_table(rows: list[dict]) -> str:
    """Costs of schedules beside Gurobi's, with the proven bound."""
    lines = ["| graph | budget, GB | cost | Gurobi, 24 h | proven bound | gap | seconds |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['graph']} | {row['budget_GB']:g} | {row['objective']:,.0f} | {row['gurobi']:,.0f} | "
              f"{row['bound']:,.0f} | {row['gap']:.2%} | {row['seconds']:.1f} |" for row in rows]
    return "\n".join(lines)


def layered_table(found: dict) -> str:
    """Random layered graphs: the solver's cost and bound beside CP-SAT's."""
    def shown(peer: dict) -> str:
        return "nothing found" if peer["cost"] is None else f"{peer['cost']:,.0f} (bound {peer['bound']:,.0f})"

    peer = found["graphs"][0]["peer"]["name"]
    lines = [f"| nodes | edges | once | cost | proven bound | gap | seconds | {peer}, {found['seconds']:g} s |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in found["graphs"]:
        figures = " | ".join("none" if row[name] is None else f"{row[name]:,.0f}"
                             for name in ("nodes", "edges", "once", "cost", "bound"))
        gap = "none" if row["gap"] is None else f"{row['gap']:.2%}"
        lines.append(f"| {figures} | {gap} | {row['seconds']:.1f} | {shown(row['peer'])} |")
    return "\n".join(lines)


def proof_table(found: dict) -> str:
    """What a better schedule could save at most, by number of blocks."""
    lines = ["| blocks | recomputed | a better schedule could save at most |", "|---:|---:|---:|"]
    lines += [f"| {row['blocks']} | {row['recomputed']:.2%} | {row['gap']:.2%} |" for row in found["rows"]]
    return "\n".join(lines)


def optimizers_table(found: dict) -> str:
    """State and time of optimizers beside their peers, and how right trust ratios are."""
    threads = list(found["rows"][0]["of_threads"])
    titles = ["optimizer", "from", "state, bytes per parameter", "time of a step", *(f"{n} threads" for n in threads)]
    lines = [f"| {' | '.join(titles)} |", f"|---|---|{'---:|' * (len(titles) - 2)}"]
    for row in found["rows"]:
        figures = ["absent", *("" for _ in threads), ""]
        if "ratio" in row:
            figures = [f"{row['state_bytes_per_parameter']:.3f}",
                       *(f"x{one['ratio']:.2f}" for one in (row, *row["of_threads"].values()))]
        lines.append(f"| {row['optimizer']} | {row['source']} | {' | '.join(figures)} |")
    return "\n".join([*lines, *_said_of_optimizers(found)])


def _said_of_optimizers(found: dict) -> list[str]:
    """What stands below the table, a paragraph each."""
    errors = dict(found["trust_ratio_error"])
    norm = errors.pop("fp32_norm_error")
    said = ", ".join(f"{where} {error:.1e}" for where, error in errors.items())
    inside = ", ".join(f"{row['optimizer']} x{row['ratio']:.2f}" for row in found["in_backward"])
    floor, first = found["muon_floor"], found["first_step"]
    steps, rate = floor["seconds"] / found["rows"][0]["seconds"], floor["flops_per_second"] / 1e9
    return [f"\nLargest relative error of LAMB's trust ratios against float64: {said}; torch's own fp32 norm of the "
            f"same weights is {norm:.1e} off.",
            f"\nA training step with steps in the backward beside one with a norm and a step after it: {inside}.",
            f"\nMuon's products are {floor['flops'] / 1e9:.1f} GFLOP, {steps:.1f} steps of AdamW at this machine's "
            f"{rate:.0f} GFLOP/s in bfloat16: no step that takes them is faster.",
            f"\nLAMB's first step in a process takes {first['nothing on disk']:.1f} s where nothing has been compiled, "
            f"{first['from disk']:.1f} s where it has, {first['without']:.2f} s by operations of torch, as models of "
            "fewer than a million parameters take it."]


TABLES: dict[str, tuple[str | tuple[str, ...], Callable]] = {
    "figures": (FIGURES, figures_table),
    "cuts": ("pruning-structured-cpu.json", cuts_table),
    "quickstart": ("quickstart-cpu.json", quickstart_table),
    "end-to-end": ("end-to-end-cpu.json", lambda found: end_to_end_table(found["rows"])),
    "end-to-end-busy": ("end-to-end-busy-cpu.json", lambda found: end_to_end_table(found["rows"])),
    "frontier": ("rematerialization-frontier-cpu.json", frontier_table),
    "overhead": ("rematerialization-overhead-cpu.json", overhead_table),
    "instances": ("rematerialization-instances-cpu.json", instances_table),
    "layered": ("rematerialization-layered-cpu.json", layered_table),
    "start": ("start-cpu.json", start_table),
    "planning-time": ("planning-time-cpu.json", lambda found: planning_time_table(found["rows"])),
    "proof": ("rematerialization-proof-cpu.json", proof_table),
    "engines": ("sharding-engines-cpu.json", lambda found: engines_table(found["rows"])),
    "ledger": ("sharding-ledger.json", lambda found: ledger_table(found["rows"])),
    "scale": ("sharding-scale.json", lambda found: scale_table(found["rows"])),
    "growth": ("sharding-scale.json", lambda found: growth_table(found["growth"])),
    "optimizers": ("optimizers-cpu.json", optimizers_table),
    "losses": ("distillation-losses-cpu.json", lambda found: side_by_side(found["rows"])),
    "errors": ("distillation-losses-cpu.json", lambda found: errors_table(found["errors"])),
    "cached": ("distillation-cached-cpu.json", cached_table),
    "runtimes": ("quantization-runtimes-cpu.json", runtimes_table),
    "generation": (("generation-cpu.json", "generation-4-bits-cpu.json"),
                   lambda *found: "\n\n".join(map(generation_table, found))),
    "allocation": ("quantization-allocation-cpu.json", lambda found: allocation_table(found["rows"])),
    "qat": ("quantization-qat-cpu.json", losses_table),
    "rounded": ("quantization-rounded-cpu.json", losses_table),
    "qat-costs": ("quantization-qat-costs-cpu.json", costs_table),
    "pruned-layers": ("pruning-layers-cpu.json", pruned_layers_table),
    "early-exits": ("pruning-early-exit-digits-cpu.json", early_exit_table),
    "pruned-once": ("pruning-one-shot-cpu.json", pruned_once_table),
    "sparse-bytes": ("pruning-bytes-cpu.json", lambda found: sparse_bytes_table(found["rows"])),
    "fiftieth": (tuple(f"pruning-fiftieth-{task}-cpu.json" for task in FIFTIETH),
                 lambda *found: "\n\n".join(map(fiftieth_table, found))),
    "language-curve": ("pruning-language-curve-cpu.json", language_curve_table),
    "healing": ("pruning-healing-cpu.json", healing_table),
    "adapters": ("adapters-cpu.json", adapters_table),
    "faults": ("faults-cpu.json", faults_table),
    "cost": ("faults-cost-cpu.json", cost_table),
    "architectures": ("architectures-cpu.json", architectures_table),
    "peers": ("distillation-peers-cpu.json", peers_table),
    "recipes": ("distillation-recipes-cpu.json", students_table),
    "students": ("distillation-students-cpu.json", students_table),
    "tasks": ("judged-on-tasks-cpu.json", judged_table),
    "classification": (tuple(f"classification-{task}-cpu.json" for task in SHAPES),
                       lambda *found: "\n\n".join(map(classification_table, found))),
}


def with_tables(document: str) -> str:
    """A document with its tables made from the result files."""
    def made(found: re.Match) -> str:
        files, make = TABLES[found["name"]]
        results = [json.loads((ROOT / "benchmarks" / "results" / file).read_text())
                   for file in ([files] if isinstance(files, str) else files)]
        return f"{found[1]}{make(*results)}\n{found[3]}"

    return MARKED.sub(made, document)


if __name__ == "__main__":
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        file.write_text(with_tables(file.read_text()))

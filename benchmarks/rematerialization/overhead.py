"""What a plan's blocks cost beside the plain model, before and apart from what they recompute.

    python -m benchmarks.rematerialization.overhead [--model gpt2] [--json FILE] [--pairs 21] [--device cpu]

In one process, steps of the plain model and of the planned one take turns, in alternating order: forward, loss,
backward, AdamW's fused step, on the same weights and batch. `time_ratio` is the median over pairs of the planned step's
time over the plain one's: CPU seconds of the process on a CPU, where other processes disturb them less than wall time.

Rows of each model, in fp32 and in bf16 autocast:

- `keeping all, bytes of the plain model`: the plan for the peak that the plain step was measured to have;
- `every block by its graph`: no block runs unchanged and none recomputes, which is what running by a graph costs;
- `half of the way`: the plan for the middle between the plain peak and the least. Its `flops_ratio` is that of
  products, attention and convolutions in a step (torch's counter), recomputed ones from the schedule.

`bytes` are measured peaks, absolute; `gradient_difference` is the largest, relative to the largest value of a tensor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rematerialization.frontier import Method, Training, difference, error_of_median, machine
from benchmarks.rematerialization.models import MODELS
from strategies.memory.meter import measure
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.costs import flops
from strategies.rematerialization.recompute_plan import RecomputePlan
from strategies.rematerialization.rematerialize import study
from strategies.rematerialization.solve.chain_program import KEEP, Block, leaves

SHAPES = ("gpt2", "llama", "qwen", "vit")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
GOAL = 1.01


def main(arguments: list[str] | None = None) -> int:
    """Measure the models asked for; print and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--precision", choices=[*PRECISIONS, "all"], default="all")
    parser.add_argument("--json", type=Path, help="where rows go; those of other models that it has stay")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in SHAPES if options.model == "all" else [options.model]:
        for precision in PRECISIONS if options.precision == "all" else [options.precision]:
            rows = one_model(name, precision, options.pairs, options.device)
            if options.json:
                save(options.json, rows)
    return 0


def one_model(name: str, precision: str, count: int, device: str) -> list[dict]:
    """The rows of one model in one precision."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    training = Training(*MODELS[name](), device=device, autocast=PRECISIONS[precision])
    for _ in range(3):
        training.step()
    with FlopCounterMode(display=False) as counter:
        training.turn()
    training.optimizer.zero_grad()
    plain = peak_of(training)
    planner = study(training.model, training.batch, optimizer=training.optimizer, autocast=training.autocast)
    plans = {"keeping all, bytes of the plain model": planner.plan(plain),
             "every block by its graph": planner.keep_all(),
             "half of the way": planner.plan((plain + planner.least.peak) // 2)}
    rows = []
    for method, plan in plans.items():
        rows.append({"model": name, "precision": precision, "method": method, "plain_bytes": plain,
                     **measured(training, planner, plan, count), "recomputed": plan.overhead,
                     "flops_ratio": 1 + repeated_flops(plan) / counter.get_total_flops(), "machine": machine(device)})
        print(shown(rows[-1]), flush=True)
    return rows


def measured(training: Training, planner: Planner, plan: RecomputePlan, count: int) -> dict:
    """Bytes and time of a plan beside the plain model."""
    planner.install(plan)
    plan.remove()
    method = Method("planned", plan.planned.install, plan.remove)
    expected = training.outcome()[0]
    method.on()
    found = difference(expected, training.outcome()[0])
    training.step()
    peak = peak_of(training)
    method.off()
    ratios, plain = pairs(training, method, count)
    return {"bytes": peak, "budget_bytes": plan.budget, "predicted_bytes": plan.peak, "time_ratio":
            statistics.median(ratios), "time_ratio_error": error_of_median(ratios), "plain_seconds":
            statistics.median(plain), "pairs": count, "gradient_difference": found, "blocks": len(plan.calls),
            "unchanged": sum(block["mode"] == KEEP for block in plan.blocks())}


def peak_of(training: Training) -> int:
    """Measured bytes of a step."""
    return measure(training.step, training.device, [training.model, training.optimizer, training.batch]).peak


def pairs(training: Training, method: Method, count: int) -> tuple[list[float], list[float]]:
    """Ratios of planned to plain seconds, pair by pair, and the plain seconds."""
    step = cpu_seconds(training) if training.device == "cpu" else training.seconds
    ratios, plain = [], []
    for pair in range(count):
        took = {}
        for mine in (False, True) if pair % 2 else (True, False):
            if mine:
                method.on()
            took[mine] = step()
            if mine:
                method.off()
        ratios.append(took[True] / took[False])
        plain.append(took[False])
    return ratios, plain


def cpu_seconds(training: Training) -> Callable[[], float]:
    """A step that returns the process's CPU seconds."""
    def step() -> float:
        began = time.process_time()
        training.step()
        return time.process_time() - began
    return step


def repeated_flops(plan: RecomputePlan) -> int:
    """Operations of products, attention and convolutions that a plan does again."""
    total = 0
    for item in plan.schedule:
        for position, which in leaves(item):
            captured, order = plan.calls[position].captured, plan.links[position].options[which].order
            costs = [int(flops(node)) for node in captured.operations]
            costs.insert(captured.forward, 0)
            total += sum(costs[index] for index in order) - sum(costs) if order else 0
            total += 0 if isinstance(item, Block) else sum(costs[:captured.forward])
    return total


def shown(row: dict) -> str:
    """A row in a line."""
    return (f"{row['model']} {row['precision']} {row['method']}: time x{row['time_ratio']:.3f} ± "
            f"{row['time_ratio_error']:.3f}, {row['unchanged']} of {row['blocks']} blocks unchanged, "
            f"{row['bytes']:,} bytes (plain {row['plain_bytes']:,}), recomputed {row['recomputed']:.2%}, products "
            f"x{row['flops_ratio']:.3f}, gradients differ by {row['gradient_difference']:.0e}")


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| model | precision | plan | measured peak, MB (plain) | blocks unchanged | recomputed | products | "
             "CPU seconds of a step |", "|---|---|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['model']} | {row['precision']} | {row['method']} | {row['bytes'] / 1e6:.1f} "
              f"({row['plain_bytes'] / 1e6:.1f}) | {row['unchanged']} of {row['blocks']} | {row['recomputed']:.1%} | "
              f"x{row['flops_ratio']:.3f} | x{row['time_ratio']:.3f} ± {row['time_ratio_error']:.3f} |" for row in rows]
    return "\n".join(lines)


def save(file: Path, rows: list[dict]) -> None:
    """Put the rows of a model and precision into a file, a row on a line."""
    def key(row: dict) -> tuple[int, int]:
        return SHAPES.index(row["model"]), list(PRECISIONS).index(row["precision"])

    kept = [row for row in json.loads(file.read_text()) if key(row) != key(rows[0])] if file.exists() else []
    merged = sorted([*kept, *rows], key=key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in merged) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())

"""Step time against peak memory: plans at several budgets beside what PyTorch and Transformers offer, in one run.

    python -m benchmarks.rematerialization.frontier --model all --json FILE [--budgets 9] [--steps N] [--device cpu]
    python -m benchmarks.rematerialization.frontier --report FILE

Every method trains the same weights on the same batch: forward, loss, backward, AdamW's fused step. Peaks are
measured and absolute: weights, gradients and optimizer state included. `time_ratio` is the median, over pairs of steps
that follow each other in alternating order, of a method's time over that of keeping all in plain eager mode. All
graphs run by eager kernels. Budgets lie evenly between keep-all's measured peak and the least that a plan needs; then
a plan is made for the bytes that each peer was measured to need (`beside` names the peer).

Peers: checkpointing of blocks as a model offers it (of blocks and of stages in convolutional networks, which offer
none), torch's min-cut partitioner at several `activation_memory_budget`s, and op-level selective checkpointing that
saves matrix products, convolutions and attention. The partitioner gets what a plan gets: a block, or a convolutional
network whole. `gradient_difference` is the largest difference to keep-all's gradients after the same random numbers,
over the largest value of the same tensor, and `buffer_difference` that of running statistics and the like. A peer whose
gradients differ by more than rounding (random masks drawn anew, say) does not train the same step: it is named, and
left out of the comparison.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
import transformers
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.rematerialization.models import MODELS
from strategies.memory.meter import measure
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.recompute_plan import BudgetError
from strategies.rematerialization.rematerialize import study

ROUNDING = 1e-3
"""Difference of gradients that is taken for rounding."""
TOLERANCE = 0.03
"""Difference of step times that is taken for noise, as is twice the standard error where that is more."""
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
SAVED = ("mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_dot_product")


@dataclass
class Method:
    """A way to train, put on and taken off a model between steps."""

    name: str
    on: Callable[[], object] = lambda: None
    off: Callable[[], object] = lambda: None
    facts: dict = field(default_factory=dict)


class Training:
    """A model with its batch and optimizer; `blocks` repeat in it, and a convolutional network has `stages` of them."""

    def __init__(self, model: nn.Module, batch: dict, blocks: list[nn.Module], stages: list[nn.Module] | None = None, *,
                 device: str = "cpu", autocast: torch.dtype | None = None) -> None:
        self.model, self.blocks, self.stages = model.to(device).train(), blocks, stages
        self.batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                      for name, value in batch.items()}
        self.device, self.autocast = device, autocast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def turn(self) -> None:
        """Forward and backward."""
        with torch.autocast(self.device, self.autocast) if self.autocast is not None else nullcontext():
            loss = self.model(**self.batch)["loss"]
        loss.backward()

    def step(self) -> None:
        """A whole training step."""
        self.turn()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Time of a step."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        self.step()
        wait()
        return time.perf_counter() - began

    def outcome(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradients, and buffers as a step leaves them; the random numbers are the same in every call."""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        torch.manual_seed(1)
        self.turn()
        gradients = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.optimizer.zero_grad()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])
        return gradients, buffers


# ---- what is run

def main(arguments: list[str] | None = None) -> int:
    """Run the models asked for, print tables and verdicts; returns 1 if a plan failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--json", type=Path, help="where rows go; those of other models that it has stay")
    parser.add_argument("--budgets", type=int, default=9)
    parser.add_argument("--steps", type=int, help="pairs of steps; by default 5 seconds of them, 7 to 40")
    parser.add_argument("--threads", type=int, default=1, help="on CPU; one is disturbed least by other processes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"])
    parser.add_argument("--report", type=Path, help="print what a file holds and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.report:
        rows = json.loads(options.report.read_text())
        print("\n\n".join(report(rows, name) for name in dict.fromkeys(row["model"] for row in rows)))
        return 0
    missing = 0
    for name in MODELS if options.model == "all" else [options.model]:
        rows = one_model(name, options)
        print(report(rows, name), end="\n\n", flush=True)
        if options.json:
            save(options.json, name, rows)
        missing += options.budgets - sum(row["method"] == "limbeck" and "beside" not in row for row in rows)
    return 1 if missing else 0


def one_model(name: str, options: argparse.Namespace) -> list[dict]:
    """The rows of every method on one model."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    training = Training(*MODELS[name](), device=options.device, autocast=getattr(torch, options.autocast or "", None))
    for _ in range(3):
        training.step()
    began = time.perf_counter()
    planner = study(training.model, training.batch, optimizer=training.optimizer, autocast=training.autocast)
    everything, least = planner.keep_all(), planner.least
    facts = {"predicted_peak": everything.peak, "least": least.peak, "least_bound": planner.least_bound,
             "plan_seconds": time.perf_counter() - began}
    rows = [row(name, training, Method("keep_all", facts=facts), options.steps)]
    budgets = np.ceil(np.linspace(max(rows[0]["measured_peak"], least.peak), least.peak, options.budgets)).astype(int)
    methods = [("limbeck", functools.partial(planned, planner, int(budget))) for budget in budgets]
    for method, make in [*methods, *peers(training).items()]:
        try:
            rows.append(row(name, training, make(method), options.steps))
        except Exception as error:  # a finding, and no reason not to measure the others
            training.optimizer.zero_grad()
            print(f"{name} {method}: FAILS: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    rivals = [row for row in rows if row["method"] not in ("limbeck", "keep_all")
              and row["gradient_difference"] <= ROUNDING and row["measured_peak"] >= least.peak]
    for rival in rivals:
        made = planned(planner, rival["measured_peak"], "limbeck")
        made.facts["beside"] = rival["method"]
        rows.append(row(name, training, made, options.steps))
    return rows


def row(name: str, training: Training, method: Method, steps: int | None) -> dict:
    """What one method needs and takes."""
    expected = training.outcome()
    method.on()
    try:
        gradients, buffers = map(difference, expected, training.outcome())
        del expected
        training.step()
        peak = measure(training.step, training.device, [training.model, training.optimizer, training.batch]).peak
    finally:
        method.off()
    ratios, seconds = pairs(training, method, steps)
    budget = method.facts.get("budget_bytes")
    found = {"model": name, "method": method.name, "budget_bytes": budget, "predicted_peak": None,
             "measured_peak": peak, "time_ratio": 1.0 if method.name == "keep_all" else statistics.median(ratios),
             "fits": None if budget is None else peak <= budget, "time_ratio_error": error_of_median(ratios),
             "seconds": statistics.median(seconds), "pairs": len(ratios), "gradient_difference": gradients,
             "buffer_difference": buffers, **method.facts, "machine": machine(training.device)}
    print(f"{name} {method.name} {budget or ''}: peak {peak:,}, time x{found['time_ratio']:.3f}, gradients differ by "
          f"{gradients:.1e}", flush=True)
    return found


def pairs(training: Training, method: Method, steps: int | None) -> tuple[list[float], list[float]]:
    """Ratios of a method's step time to keep-all's, pair by pair, and the method's seconds."""
    ratios, seconds, count = [], [], steps or 7
    while len(ratios) < count:
        took = {}
        for mine in (False, True) if len(ratios) % 2 else (True, False):
            if mine:
                method.on()
            try:
                took[mine] = training.seconds()
            finally:
                if mine:
                    method.off()
        if not steps and not ratios:
            count = int(min(40, max(7, 5 / sum(took.values()))))
        ratios.append(took[True] / took[False])
        seconds.append(took[True])
    return ratios, seconds


def error_of_median(values: Sequence[float]) -> float:
    """Standard error of a median, from the quartiles as a normal distribution would have them."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(1.2533 * (high - low) / 1.349 / len(values) ** 0.5)


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest value of the same tensor, or over 1e-6 of the largest of all."""
    most = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    return max((float((value - found[name]).abs().max()) / max(float(value.abs().max()), 1e-6 * most, 1e-30)
                for name, value in expected.items() if value.numel()), default=0.0)


# ---- methods

def planned(planner: Planner, budget: int, name: str) -> Method:
    """A plan for a budget."""
    began, refused = time.perf_counter(), False
    try:
        plan = planner.plan(budget)
    except BudgetError:  # the solver did not find again what has been found already
        plan, refused = planner.least, True
        if plan.peak > budget:
            raise
    took = time.perf_counter() - began
    planner.install(plan)
    plan.remove()
    return Method(name, plan.planned.install, plan.remove, {
        "budget_bytes": budget, "predicted_peak": plan.peak, "overhead": plan.overhead, "gap": plan.gap,
        "plan_seconds": took, "fallbacks": len(plan.fallbacks), "refused": refused})


def peers(training: Training) -> dict[str, Callable[[str], Method]]:
    """What can be had without us by name, each to be made when its turn comes."""
    blocks, stages = training.blocks, training.stages
    if stages:
        made = {"checkpoint blocks": functools.partial(wrapped, blocks, checkpointed),
                "checkpoint stages": functools.partial(wrapped, stages, checkpointed)}
    else:
        made = {"checkpoint blocks": functools.partial(offered, training.model, 1),
                "checkpoint every 2nd block": functools.partial(offered, training.model, 2)}
    made["selective checkpoint"] = functools.partial(wrapped, blocks, selective)
    return made | {f"min-cut {fraction}": functools.partial(wrapped, [training.model] if stages else blocks,
                                                            functools.partial(min_cut, fraction))
                   for fraction in FRACTIONS}


def wrapped(modules: Sequence[nn.Module], wrap: Callable[[Callable], Callable], name: str) -> Method:
    """A method that puts something in place of modules' forwards."""
    made = [(module, wrap(module.forward)) for module in modules]

    def on() -> None:
        for module, forward in made:
            module.forward = forward

    def off() -> None:
        for module, _ in made:
            module.__dict__.pop("forward", None)

    return Method(name, on, off)


def offered(model: nn.Module, every: int, name: str) -> Method:
    """Transformers' own checkpointing of every block, or of every second."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    keywords = {"every_n_layers": every} if "every_n_layers" in inspect.signature(enable).parameters else {}
    if every > 1 and not keywords:
        raise NotImplementedError("this version of Transformers checkpoints every block or none")
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    return Method(name, functools.partial(enable, {"use_reentrant": False}, **keywords), disable)


def checkpointed(forward: Callable) -> Callable:
    """A forward of which only the input is kept."""
    return functools.partial(checkpoint, forward, use_reentrant=False)


def selective(forward: Callable) -> Callable:
    """A forward of which the input and the results of matrix products, convolutions and attention are kept."""
    def policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
        name = operation.overloadpacket.__name__
        keep = name in SAVED or name.startswith(SAVED[-1])
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def min_cut(fraction: float, forward: Callable) -> Callable:
    """A forward captured and split by torch's partitioner, and run by eager kernels."""
    def partition(*args, **kwargs):
        with torch._functorch.config.patch(activation_memory_budget=fraction):
            return min_cut_rematerialization_partition(*args, **kwargs)

    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    backend = aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partition)
    # blocks share code, and torch.compile would give up on the ninth: its limit is by code, so each gets its own
    call.__code__ = call.__code__.replace(co_name="block")
    return torch.compile(call, backend=backend, fullgraph=True, dynamic=False)


# ---- what is printed and written

def report(rows: list[dict], name: str) -> str:
    """Table and verdict of one model."""
    mine = [row for row in rows if row["model"] == name]
    return f"{table(mine)}\n\n{verdict(mine)}"


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table, peaks in MB (1e6 bytes)."""
    lines = ["| model | method | budget, MB | predicted, MB | measured, MB | step time | planned overhead | gap | "
             "plan, s | gradients differ by |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        bytes_ = [cell(value and value / 1e6, ".2f")
                  for value in (row["budget_bytes"], row["predicted_peak"], row["measured_peak"])]
        lines.append(f"| {row['model']} | {row['method']} | {' | '.join(bytes_)} | x{row['time_ratio']:.3f} ± "
                     f"{row['time_ratio_error']:.3f} | {cell(row.get('overhead'), '.1%')} | "
                     f"{cell(row.get('gap'), '.1%')} | {cell(row.get('plan_seconds'), '.1f')} | "
                     f"{row['gradient_difference']:.0e} |")
    return "\n".join(lines)


def verdict(rows: list[dict]) -> str:
    """Whether plans kept to their budgets, were predicted well, and were beaten by a peer that fits."""
    plans = [row for row in rows if row["method"] == "limbeck"]
    peers_ = [row for row in rows if row["method"] not in ("limbeck", "keep_all")]
    others = [row for row in peers_ if row["gradient_difference"] <= ROUNDING]
    if not plans:
        return "no plans"
    over = sum(not row["fits"] for row in plans)
    off = max(abs(row["predicted_peak"] / row["measured_peak"] - 1) for row in plans)
    least = min(row["measured_peak"] for row in plans)
    lines = [f"{rows[0]['model']}: {over} of {len(plans)} plans measured over their budget; predicted and measured "
             f"peak differ by {off:.2%} at most; gradients by {max(row['gradient_difference'] for row in plans):.1e}"]
    notes = [f"  left out: {row['method']}, whose gradients differ by {row['gradient_difference']:.0e}"
             for row in peers_ if row not in others]
    lines += [f"  refused: {row['budget_bytes'] / 1e6:.2f} MB, for which there is a plan" for row in plans
              if row.get("refused")]
    for plan in plans:
        fitting = [row for row in others if row["measured_peak"] <= plan["budget_bytes"]]
        for row in fitting:
            noise = max(TOLERANCE * row["time_ratio"], 2 * np.hypot(plan["time_ratio_error"], row["time_ratio_error"]))
            if plan["time_ratio"] > row["time_ratio"] + noise:
                lines.append(f"  slower: x{plan['time_ratio']:.3f} at {plan['budget_bytes'] / 1e6:.2f} MB, where "
                             f"{row['method']} takes x{row['time_ratio']:.3f} ({row['measured_peak'] / 1e6:.2f} MB)")
    lines += [f"  least: {least / 1e6:.2f} MB is not below {row['method']}'s {row['measured_peak'] / 1e6:.2f} MB"
              for row in others if row["measured_peak"] <= least]
    if len(lines) == 1:
        lines.append(f"  at no budget slower than a peer that fits it (tolerance {TOLERANCE:.0%} or 2 sd); least peak "
                     f"{least / 1e6:.2f} MB below every peer's")
    return "\n".join([*lines, *notes])


def save(file: Path, name: str, rows: list[dict]) -> None:
    """Put a model's rows into a file, in the order of `MODELS`, a row on a line."""
    kept = [row for row in json.loads(file.read_text()) if row["model"] != name] if file.exists() else []
    order = list(MODELS)
    merged = sorted([*kept, *rows], key=lambda row: order.index(row["model"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in merged) + "\n]\n")


def machine(device: str) -> str:
    """What figures were measured on."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    sys.exit(main())

"""Shows a plan as text or JSON: the resolved experiment with the origin of each value, the decisions, and the bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from strategies.rematerialization.recompute_plan import PROVEN
from trainer.data.classified_preview import ClassifiedPreview
from trainer.data.data_preview import Preview
from trainer.experiment.explain import resolved_table
from trainer.experiment.load import Source
from trainer.planning.plan import NOMINAL_STEPS, Plan
from trainer.planning.step_memory import MemoryPlan
from trainer.run.metrics import console, readable
from trainer.run.pace import readable_beside

BLOCKS = " ▁▂▃▄▅▆▇█"


def show_plan(source: Source, plan: Plan, data: Sequence[Preview | ClassifiedPreview], start: str) -> None:
    """Print the plan, the resolved experiment with the origin of each value, and what the data is.

    Args:
        start: what a start would do with the run folder.
    """
    print_columns(f"Experiment {source.experiment.name}: key, value, where it was written", resolved_table(source))
    print_columns("Plan", [("run folder", start), *_plan_rows(plan, source.experiment.data.is_language)])
    print_columns("Ledger: bytes per process, each part at its largest", [
        (name.replace("_", " "), f"{count:>15,}", readable(count)) for name, count in plan.ledger.rows()])
    if plan.memory is not None:
        print_columns("Memory at the peak of a step: predicted bytes per process", _memory_rows(plan.memory))
    else:
        console.print("  activations and the peak are not in it: this architecture cannot be run without data")
    for one in data:
        of = f", {one.weight:.1%} of the tokens" if len(data) > 1 else ""
        print_columns(f"Data: {one.source}{of}", _data_rows(one) if isinstance(one, Preview) else one.rows)
        for example in one.examples:
            console.print(f"  {example}", style="dim" if console.is_terminal else None)


def print_columns(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns without truncation or wrapping, so that the output can be piped to `grep`."""
    console.print(f"\n{title}")
    widths = [min(44, max(len(row[column]) for row in rows)) for column in range(len(rows[0]) - 1)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        console.print("  " + "  ".join([*padded, row[-1]]))


def _plan_rows(plan: Plan, language: bool) -> list[tuple[str, str]]:
    steps = "known once the data is tokenized" if plan.steps is None else f"{plan.steps:,}"
    of, tokens = ("sequences", f"; {plan.tokens_per_step:,} tokens") if language else ("rows", "")
    rows = [
        ("processes", f"{plan.topology.ranks} on {plan.topology.device}"),
        ("effective batch", f"{plan.batch_size} {of} = {plan.micro_batch} per micro-batch x {plan.accumulation} "
                            f"accumulated x {plan.topology.data_parallel} processes{tokens}"),
        ("sharding", plan.sharding), ("steps", steps),
        ("precision", f"{plan.precision} forward and backward, fp32 weights and updates"),
    ]
    rates = [rate for _, rate in plan.learning_rates]
    top = max(rates)
    curve = "".join(BLOCKS[max(1, round(rate / top * (len(BLOCKS) - 1)))] for rate in rates)
    nominal = "" if plan.steps else f", drawn over {NOMINAL_STEPS:,} steps"
    rows.append(("learning rate", f"{rates[0]:.2e} {curve} {rates[-1]:.2e} (peak {top:.2e}{nominal})"))
    rows += [(f"{name} parameters", f"{count:,}") for name, count in plan.parameters.items()]
    smaller = f", {plan.teacher_bytes / plan.student_bytes:.1f} times smaller than the teacher's " \
              f"{readable(plan.teacher_bytes)} of weight files" if plan.teacher_bytes else ""
    rows.append(("student file", f"{plan.student_bytes:,} bytes of tensors{smaller}"))
    if plan.full_precision is not None:
        rows.append(("not quantized", plan.full_precision))
    if plan.balancing is not None:
        rows.append(("routers", plan.balancing))
    return rows


def _data_rows(data: Preview) -> list[tuple[str, ...]]:
    if data.not_looked_at:
        return [("not looked at", data.not_looked_at)]
    about = "" if data.exact else "about "
    rows = [("read", f"{data.read:,} records" + ("" if data.exact else "; what follows is estimated from them")),
            ("records", "it is not known how many there are" if data.records is None else
             f"{about}{data.records:,} to train on")]
    if data.rows is not None:
        rows += [("rows", f"{about}{data.rows:,}"), ("tokens", f"{about}{data.tokens:,}")]
    rows.append(("learned", f"{data.learned:.1%} of the tokens"))
    rows.append(("cut", f"{data.cut:.1%} of the records are longer than a row; {data.left_out:.1%} of all tokens are "
                        "left out"))
    return [*rows, *(("note", note) for note in data.notes)]


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, ...]]:
    rows = [(name, f"{count:>15,}", readable(count))
            for name, count in sorted(memory.parts.items(), key=lambda part: -part[1]) if count]
    rows.append(("peak", f"{memory.peak:>15,}", f"{readable(memory.peak)}, at: {memory.moment}"))
    if memory.budget is None:
        return [*rows, ("budget", f"{'none':>15}", "nothing is recomputed; set memory.budget=... to fit fewer bytes")]
    rows.append(("budget", f"{memory.budget:>15,}", f"{readable(memory.budget)}; keeping all would need "
                                                    f"{readable_beside(memory.keep_all, memory.budget)}"))
    if not memory.blocks and not memory.unplanned:
        return [*rows, ("recomputed", f"{'nothing':>15}", "the model fits as it is")]
    rows.append(("recomputed", f"{memory.recomputed:>15.1%}", "of the blocks' forward and backward time; a better "
                 f"schedule could save at most {memory.gap:.1%}"))
    if memory.solver == "exact":
        rows.append(("solver", f"{memory.solver:>15}", PROVEN))
    if memory.blocks:
        rows.append(("blocks", f"{'bytes kept':>15}", "by each between forward and backward, beside its input"))
    rows += [(" ".join(names), f"{kept:>15,}", what) for names, kept, what in _block_rows(memory)]
    return [*rows, *(("as it is", "", text) for text in memory.unplanned)]


def _block_rows(memory: MemoryPlan) -> list[tuple[list[str], int, str]]:
    """Group consecutive blocks that run alike: names of the first and last, bytes each keeps, and how each runs."""
    rows: list[tuple[list[str], int, str]] = []
    for block in memory.blocks:
        what = "keeps all" if not block["seconds"] else f"recomputes {1000 * block['seconds']:.2f} ms"
        what += "" if block["segment"] is None else f", in the segment of blocks {block['segment'][0]} to " \
                                                    f"{block['segment'][1]}, of which one input is kept"
        if rows and rows[-1][1:] == (block["kept"], what):
            rows[-1][0][1:] = ["to", block["name"]]
        else:
            rows.append(([block["name"] or "model"], block["kept"], what))
    return rows


def plan_json(source: Source, plan: Plan, data: Sequence[Preview | ClassifiedPreview], start: str) -> str:
    """The resolved experiment, the plan, what the data is, and what a start would do with the run folder, as JSON."""
    return json.dumps({"experiment": source.experiment.model_dump(mode="json"),
                       "origins": {key: origin for key, _, origin in resolved_table(source)},
                       "plan": plan.to_dict(), "run_folder": start, "data": [asdict(one) for one in data]}, indent=2)

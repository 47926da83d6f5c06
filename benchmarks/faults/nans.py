"""NaN in data, in a loss, in the gradient of one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.contenders import Contender, Limbeck, lines_of
from benchmarks.faults.fault_material import POISONED
from benchmarks.faults.judging import PATIENCE, Row, gone_on, judge_end

POISON = Path(__file__).with_name("poisoned.py")
SHORT = ("training.steps=12", "training.checkpoint_every=4", "training.evaluate_every=12")


def sample_row(contender: Contender, room: Path) -> Row:
    """A sample whose loss is NaN, whenever it comes."""
    row = Row("NaN in a sample", contender.name, "1 process, forked", bitwise=None)
    if isinstance(contender, Limbeck):
        carried(row, contender, room / "run", "a NaN sample", script=POISON, first=(f"sample:{POISONED}",))
        named = [line for line in lines_of(room / "run" / "metrics.jsonl") if line.get("nonfinite")]
        right = named and all(POISONED in place["rows"] for line in named for place in line["nonfinite"])
        row.remarks.append("each step with it is skipped, and names it" if right else "the sample is not named")
        return row
    poisoned = replace(contender, material=replace(contender.material, rows=contender.material.poisoned))
    carried(row, poisoned, room / "run", "a NaN sample")
    if row.unrecoverable:
        row.remarks.append("exit code 0 with NaN weights" if "not finite" in row.failures[0] else "stops")
    return row


def rank_rows(limbeck: Limbeck, room: Path) -> list[Row]:
    """NaN in one rank's loss, and in one rank's gradient alone."""
    rows = []
    for kind, words in (("loss", "NaN in one rank's loss"), ("gradient", "NaN in one rank's gradient")):
        row = Row(words, "Limbeck", "2 processes, forked", bitwise=None)
        for rank in (0, 1):
            folder = room / f"{kind}-{rank}"
            carried(row, replace(limbeck, options=SHORT), folder, f"NaN in the {kind} of rank {rank}", script=POISON,
                    first=(f"{kind}:5:{rank}",), processes=2)
            named = [line["step"] for line in lines_of(folder / "metrics.jsonl") if "nonfinite" in line]
            if named != [5]:
                row.fails(f"NaN in the {kind} of rank {rank} at step 5: logged at steps {named}")
        rows.append(row)
    return rows


def stopped_row(limbeck: Limbeck, room: Path) -> Row:
    """NaN from a step on: the run stops by itself, and goes on where the cause is gone."""
    row, limbeck = Row("NaN from a step on", "Limbeck", "1 process, forked", bitwise=None), replace(
        limbeck, options=SHORT)
    started = limbeck.start(room / "run", script=POISON, first=("from:5",))
    code = started.wait(PATIENCE)
    gone_on(row, limbeck, room / "run", None, "NaN from step 5 on", started.reached)
    row.remarks.append(f"it had stopped by itself with code {code}")
    return row


def carried(row: Row, contender: Contender, folder: Path, what: str, **how: Any) -> None:
    """Count a run with a fault in its numbers, which has to end by itself with good weights."""
    started = contender.start(folder, **how)
    code = started.wait(PATIENCE)
    row.tries += 1
    if code != 0:
        row.unrecoverable += 1
        row.fails(f"{what}: ended with {code}", started.text())
        return
    row.resumed += 1
    judge_end(row, contender, folder, None, what)

"""SIGTERM to each rank in each phase of a run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.faults.contenders import Limbeck, lines_of
from benchmarks.faults.judging import PATIENCE, End, Row, gone_on, undisturbed
from benchmarks.faults.processes import Started

OPTIONS = ("training.steps=12", "training.evaluate_every=3", "training.checkpoint_every=4", "training.micro_batch=2",
           "data.validation.rows=60")
PHASES = ("start", "step", "evaluation", "save", "export")
REQUEUE = 75  # the exit code of a run that was asked to stop
STOPS = 60.0  # seconds within which a run must have stopped


def signal_row(limbeck: Limbeck, room: Path, phases: tuple[str, ...] = PHASES, ranks: int = 2, how: str = "launched",
               seed: int = 0) -> Row:
    """Ask each rank in each phase to stop, and start the run again."""
    limbeck, chooser = replace(limbeck, options=OPTIONS), random.Random(seed)
    row = Row("SIGTERM to each rank in each phase", limbeck.name, f"{ranks} processes, {how}")
    end = undisturbed(limbeck, room / "whole", how=how, processes=ranks)
    requeued, over, slowest = 0, 0, 0.0
    for phase in phases:
        for rank in range(ranks):
            what, folder = f"SIGTERM to rank {rank}, {phase}", room / f"{phase}-{rank}"
            started = limbeck.start(folder, how=how, processes=ranks)
            started.until(moment(phase, limbeck, folder, started), PATIENCE)
            started.pause(chooser.uniform(0, 0.1))
            pid = started.pid(rank)
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
            began = time.monotonic()
            code = started.wait(STOPS)
            slowest = max(slowest, time.monotonic() - began if code else 0)
            requeued, over = requeued + asked_to_requeue(folder, code), over + (code == 0)
            restarted(row, limbeck, folder, end, what, started, code, how=how, processes=ranks)
    row.remarks.append(f"{requeued} ended with {REQUEUE} or left it for `limbeck status`, within {slowest:.0f} s"
                       + (f"; {over} had too little left to do to be stopped" if over else ""))
    return row


def moment(phase: str, limbeck: Limbeck, folder: Path, started: Started) -> Callable[[], object]:
    """Whether a phase has been reached."""
    def evaluating() -> bool:
        return started.reached >= 6 and not any("held_out" in line and line["step"] >= 6
                                                for line in lines_of(folder / "metrics.jsonl"))

    return {"start": lambda: "process(es) on" in started.text(), "step": lambda: started.reached >= 5,
            "evaluation": evaluating, "save": lambda: 8 in limbeck.numbered(folder),
            "export": lambda: "reloading in a fresh process" in started.text()}[phase]


def asked_to_requeue(folder: Path, code: int | None) -> bool:
    """Whether a run that was stopped says so to a scheduler."""
    file = folder / ".ended.json"
    return code == REQUEUE or (file.exists() and json.loads(file.read_text()).get("code") == REQUEUE)


def restarted(row: Row, limbeck: Limbeck, folder: Path, end: End, what: str, started: Started, code: int | None,
              **how) -> None:
    """Start a stopped run again; one that did not stop in time has failed already."""
    if code is None:
        row.tries += 1
        row.unrecoverable += 1
        row.fails(f"{what}: it did not stop within {STOPS:.0f} s", started.text())
        return
    had = any(not path.name.startswith(".") for path in limbeck.numbered(folder).values())
    gone_on(row, limbeck, folder, end, what, started.reached, had=had, **how)

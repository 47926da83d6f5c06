"""Ranks that die or stall, other numbers of processes, other numbers of workers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.contenders import Limbeck, lines_of
from benchmarks.faults.judging import PATIENCE, Row, gone_on, undisturbed
from benchmarks.faults.processes import Started

OPTIONS = ("training.steps=16", "training.checkpoint_every=3", "training.evaluate_every=16", "training.micro_batch=2")
AT = 8  # the step after which a rank is hit
TIMEOUT = 10  # seconds, run.timeout of runs that stall
ENDS = 90.0  # seconds within which the other ranks must have ended
SAME = 1e-5  # relative difference of losses on another number of processes


def lost_rank_row(limbeck: Limbeck, room: Path, sign: signal.Signals, how: str, ranks: tuple[int, ...] = (0, 1)
                  ) -> Row:
    """A rank is killed (SIGKILL) or stalls (SIGSTOP): the other has to end and to name it, and the run goes on."""
    limbeck = replace(limbeck, options=(*OPTIONS, f"run.timeout={TIMEOUT}"))
    stalls = sign == signal.SIGSTOP
    words = "a rank stalls" if stalls else "a rank dies"
    row = Row(words, limbeck.name, f"2 processes, {how}")
    end = undisturbed(limbeck, room / "whole", how=how, processes=2)
    named, slowest = 0, 0.0
    for rank in ranks:
        folder, what = room / f"{sign.name}-{rank}", f"{words}: rank {rank}"
        started = limbeck.start(folder, how=how, processes=2)
        ended, seconds = hit(started, rank, sign)
        slowest = max(slowest, seconds)
        named += f"process {rank}" in started.text()
        if not ended:
            row.fails(f"{what}: the other had not ended after {ENDS:.0f} s", started.text())
        gone_on(row, limbeck, folder, end, what, started.reached, how=how, processes=2)
    timeout = f", run.timeout being {TIMEOUT}" if stalls else ""
    row.remarks.append(f"the others ended within {slowest:.0f} s{timeout}; {named} of {row.tries} named it")
    return row


def hit(started: Started, rank: int, sign: signal.Signals) -> tuple[bool, float]:
    """Send a rank a signal; whether the others then ended by themselves, and the seconds that they took."""
    pid = started.pid(rank) if started.until(lambda: started.reached >= AT, PATIENCE) else None
    if pid is None:
        raise RuntimeError(f"it did not come to step {AT}:\n{started.text()[-3000:]}")
    os.kill(pid, sign)
    began = time.monotonic()
    started.until(lambda: started.pid(1 - rank) is None, ENDS)
    seconds = time.monotonic() - began
    ended = started.pid(1 - rank) is None
    started.kill()
    return ended, seconds


def world_row(limbeck: Limbeck, room: Path) -> Row:
    """2, 1 and 2 processes, each killed: the same rows in the same order, and losses that differ by rounding alone."""
    limbeck = replace(limbeck, options=(*OPTIONS, *_no_dropout()))
    row = Row("2, 1, then 2 processes", limbeck.name, "forked", bitwise=None)
    undisturbed(limbeck, room / "whole", processes=2)
    folder = room / "run"
    killed_at(5, limbeck, folder, processes=2)
    reached = killed_at(11, limbeck, folder)
    gone_on(row, limbeck, folder, None, "2, 1, then 2 processes", reached, processes=2)
    ours, whole = (_order(place) for place in (folder, room / "whole"))
    apart = max(abs(ours[step][0] / whole[step][0] - 1) for step in whole) if ours.keys() == whole.keys() else 1.0
    same = apart < SAME and all(ours[step][1] == whole[step][1] for step in whole)
    if not same:
        row.unrecoverable += 1
        row.fails(f"2, 1, then 2 processes: another order; losses are {apart:.1e} apart")
    row.remarks.append(f"the same rows at every step, losses within {apart:.0e}" if same else "another order")
    return row


def workers_row(limbeck: Limbeck, room: Path) -> Row:
    """0, 2 and 1 worker processes that read the data, each killed."""
    limbeck = replace(limbeck, options=OPTIONS)
    row = Row("0, 2, then 1 data workers", limbeck.name, "1 process, forked")
    end, folder = undisturbed(limbeck, room / "whole"), room / "run"
    killed_at(5, limbeck, folder)
    reached = killed_at(11, limbeck, folder, "data.workers=2")
    gone_on(row, limbeck, folder, end, "other numbers of workers", reached, "data.workers=1")
    return row


def killed_at(step: int, limbeck: Limbeck, folder: Path, *options: str, **how: Any) -> int:
    """Start a run and kill it after a step; returns the last step that it had logged."""
    started = limbeck.start(folder, *options, **how)
    if not started.until(lambda: started.reached >= step, PATIENCE):
        raise RuntimeError(f"it did not come to step {step}:\n{started.text()[-3000:]}")
    started.kill()
    return started.reached


def _no_dropout() -> tuple[str, ...]:
    """Each process draws for itself, so that with dropout another number of processes is another run."""
    return "student.architecture.hidden_dropout=0.0", "student.architecture.attention_dropout=0.0"


def _order(folder: Path) -> dict[int, tuple[float, Any]]:
    """Loss and tokens of every step: rows of different length tell which they were."""
    return {line["step"]: (line["loss"], line["tokens"]) for line in lines_of(folder / "metrics.jsonl")
            if "loss" in line}

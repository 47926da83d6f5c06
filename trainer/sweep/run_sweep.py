"""Carry out a sweep: everything checked before the first run, then run by run, and a table after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.distributed.signals import AT_ONCE
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.run.run_status import AGAIN_LATER, in_use
from trainer.sweep.jobs import Job, Jobs, Spawn, cores, last_words, start_process, visible_devices, was_stopped
from trainer.sweep.sweep_file import SweepSource
from trainer.sweep.sweep_metrics import figures
from trainer.sweep.sweep_plan import SweepPlan, console
from trainer.sweep.sweep_record import RunRecord, SweepFolder, SweepRecord
from trainer.sweep.sweep_table import failures, markdown, number, rows_of, table, verdict


class Conductor:
    """Starts the runs of a plan as there is room, and writes record and table as they end.

    Args:
        plan: the sweep.
        command: the words that start `train.py`.
        spawn: starts a process, see `Jobs`.
    """

    def __init__(self, plan: SweepPlan, command: Sequence[str], spawn: Spawn = start_process) -> None:
        self._plan, self._command = plan, command
        self._record, self._folder = plan.record, plan.folder
        sweep = plan.source.sweep
        self._jobs = Jobs(sweep.jobs, visible_devices(), spawn)
        self._threads = max(1, cores() // sweep.jobs)
        self._waiting = [run for run in self._record.runs if run.state != "finished"]
        self._durations: list[float] = []

    def carry_out(self) -> int:
        """Run all that is to be run; returns the exit code."""
        with self._jobs.forwarding():
            while True:
                while self._jobs.has_room and (record := self._next()) is not None:
                    self._start(record)
                if not self._jobs.running:
                    break
                for job in self._jobs.ended():
                    self._end(job)
        write_results(self._folder, self._record)
        return self._code()

    def _next(self) -> RunRecord | None:
        if not self._waiting:
            self._waiting = self._plan.propose()
        return self._waiting.pop(0) if self._waiting else None

    def _start(self, record: RunRecord) -> None:
        log = self._folder.path / record.log
        resumes = self._folder.run(record).checkpoints.exists()
        command = [*self._command, *self._plan.runs[record.label, record.seed].words(self._threads)]
        record.state, record.said = "running", ""
        self._folder.write(self._record)  # first, so that a run is known to be this sweep's if that is killed
        self._jobs.start(record, command, log)
        self._say(f"{record.title}: {'goes on' if resumes else 'started'}, log in {log}")

    def _end(self, job: Job) -> None:
        record: RunRecord = job.run
        folder, code = self._folder.run(record), job.process.returncode
        seconds = time.monotonic() - job.since
        if code == 0 and folder.finished:
            try:
                record.figures = figures(folder, self._record.metric)
            except UserError as error:
                record.state, record.said = "failed", str(error)
            else:
                record.state = "finished"
                self._durations.append(seconds)
                self._say(f"{record.title}: {self._record.metric} {number(record.figures[self._record.metric])}, "
                          f"{seconds:.0f} s; {self._progress()}")
        elif was_stopped(job, self._jobs.asked is not None):
            record.state, record.said = "stopped", ""
            self._say(f"{record.title}: stopped")
        else:
            record.state, record.said = "failed", last_words(job)
            self._say(f"{record.title}: failed with code {code}: {record.said}")
        write_page(self._folder, self._record)

    def _progress(self) -> str:
        done, total = self._record.count("finished"), self._record.total
        left = (total - done - self._record.count("failed")) * sum(self._durations) / len(self._durations)
        left /= self._jobs.most
        return f"{done} of {total} runs" + (f", about {_duration(left)} left" if done < total else "")

    def _code(self) -> int:
        if self._jobs.at_once:
            return AT_ONCE
        if self._jobs.asked is not None:
            return AGAIN_LATER
        if self._record.count("failed"):
            return 1
        return AGAIN_LATER if self._record.count("stopped") else 0

    def _say(self, text: str) -> None:
        console.print(f"{self._record.name}  {text}")


def run_sweep(source: SweepSource, command: Sequence[str], dry_run: Callable[[SweepPlan], None] | None = None,
              spawn: Spawn = start_process) -> int:
    """Run a sweep, or go on with it, and print and write its results. Returns the exit code.

    Args:
        source: the sweep.
        command: the words that start `train.py`, in front of its arguments.
        dry_run: shows what would run, in the place of running it.
        spawn: starts a process, see `Jobs`.

    Raises:
        ExperimentErrors: a mistake in the sweep or one of its experiments; nothing has been started.
    """
    plan = SweepPlan(source)
    if dry_run is not None:
        dry_run(plan)
        return 0
    with plan.source.locating():
        plan.folder.lock()
    plan.check_in_use()
    record = plan.record
    console.print(f"{record.name}: {record.total} runs, {plan.source.sweep.jobs} at a time; {record.progress}")
    if plan.others:
        console.print(f"{record.name}: {plan.others} other runs are in {plan.folder.path}, and not of this sweep")
    plan.folder.write(record)
    code = Conductor(plan, command, spawn).carry_out()
    print_results(plan.folder, record)
    return code


def print_results(folder: SweepFolder, record: SweepRecord) -> None:
    """Print the table, what it says, and what failed."""
    console.print(f"\n{table(record)}\n\n{verdict(record)}")
    if failed := failures(record):
        console.print(failed)
    console.print(f"{record.name}: {record.progress}, see {folder.table}")


def report_sweep(path: Path) -> Path:
    """Write `sweep.md` and `sweep.png` of the folder of a sweep again, as its runs are now.

    Raises:
        UserError: the record, or a file of a run, is not as it was written.
    """
    folder = SweepFolder(path)
    record = folder.read()
    write_results(folder, record)
    print_results(folder, record)
    return folder.table


def write_results(folder: SweepFolder, record: SweepRecord) -> None:
    """Write record, page and picture."""
    from trainer.sweep.sweep_plot import draw_sweep

    write_page(folder, record)
    draw_sweep(record, folder.picture)


def sweep_status(path: Path) -> tuple[str, int, bool]:
    """How a sweep is doing in words, its exit code as of a run, and whether it is running.

    The code is 0 for a finished sweep, 75 for one to be started again, else 1.
    """
    folder = SweepFolder(path)
    return progress_of(folder, folder.read())


def progress_of(folder: SweepFolder, record: SweepRecord) -> tuple[str, int, bool]:
    """See `sweep_status`, of a record that has been read."""
    running = in_use(folder.path)
    code = 0 if record.finished else 1 if running or record.count("failed") else AGAIN_LATER
    return f"{'running; ' if running else ''}{record.progress}", code, running


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"


def write_page(folder: SweepFolder, record: SweepRecord) -> None:
    """Write `sweep.md`."""
    folder.write(record, [row.to_dict() for row in rows_of(record)])
    write_atomically(folder.table, markdown(record))


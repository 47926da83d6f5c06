"""SIGKILL at random moments around saves, again and again until the run is done."""

from __future__ import annotations

import random
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.contenders import Contender, names
from benchmarks.faults.judging import PATIENCE, End, Row, judge_end
from benchmarks.faults.processes import Started

ANYTIME = 0.1  # share of kills at any moment from the start of the process on; the others are around a save
STARTING = 3.0  # seconds within which those come
AROUND = 1.4  # lengths of a save within which the others come after it has begun
SAVES = 4  # a kill is around one of so many saves of a start


@dataclass(frozen=True)
class Undisturbed:
    """A run never stopped.

    Attributes:
        end: what it ended with.
        save: seconds of a save, from its first file or folder to its last change; the median.
        files: names of a finished checkpoint's files.
    """

    end: End
    save: float
    files: set[str]


def kill_row(contender: Contender, kills: int, room: Path, seed: int = 0) -> Row:
    """Kill runs of a contender so many times."""
    chooser, whole = random.Random(seed), watched(contender, room / "whole")
    row = Row("SIGKILL around saves", contender.name, "1 process, forked")
    runs: list[Killed] = []
    while row.tries < kills:
        runs.append(Killed(contender, room / f"run{len(runs)}", whole, row, chooser, kills))
        runs[-1].run_experiment()
    inside, by_hand, nothing = (sum(getattr(run, name) for run in runs) for name in ("inside", "by_hand", "nothing"))
    row.remarks.append(f"{inside} left a save half done; {len(runs)} runs; a save takes {whole.save * 1e3:.0f} ms")
    if row.unrecoverable:
        row.remarks.append(f"an older checkpoint was left to go on from by hand after {by_hand}, nothing after "
                           f"{nothing}")
    return row


def watched(contender: Contender, folder: Path) -> Undisturbed:
    """Train without a fault, and see how long a save takes."""
    started = contender.start(folder)
    seen: dict[int, float] = {}

    def look() -> bool:
        for number in contender.numbered(folder):
            seen.setdefault(number, time.time())
        return False

    started.until(look, PATIENCE)
    if started.code() != 0:
        raise RuntimeError(f"{contender.name} does not run at all:\n{started.text()[-3000:]}")
    lengths = [max(part.stat().st_ctime for part in (path, *path.iterdir())) - seen[number]
               for number, path in contender.numbered(folder).items()]
    return Undisturbed(End.of(contender, folder), max(0.005, statistics.median(lengths)),
                       names(contender.newest(folder)))


class Killed:
    """A run that is killed again and again until it is done, or enough kills are.

    A start that ends by itself without being done is one that cannot go on. Its newest checkpoint is then removed by
    hand, as a person would, so that the run is done in the end.

    Attributes:
        inside: kills that left a save half done.
        by_hand: kills after which it went on only when its newest checkpoints had been removed.
        nothing: kills that left no checkpoint to go on from.
    """

    def __init__(self, contender: Contender, folder: Path, whole: Undisturbed, row: Row, chooser: random.Random,
                 kills: int) -> None:
        self.contender, self.folder, self.whole, self.row = contender, folder, whole, row
        self.chooser, self.kills = chooser, kills
        self.inside = self.by_hand = self.nothing = 0
        self._good = self._open = self._stuck = 0  # kills gone on from; not judged yet; after which it does not go on
        self._done, self._had = 0, False  # last step logged; whether a checkpoint was finished

    def run_experiment(self) -> None:
        """Kill until it is done."""
        while True:
            started = self.contender.start(self.folder)
            killed = self.row.tries < self.kills and self._strike(started)
            if not killed:
                started.wait(PATIENCE)
            began = started.began
            if began is None and started.code() == 0:  # it was done already
                began = self._done
            if began is not None:
                self._went_on(began)
            if killed:
                self._remember(started)
            elif started.code() == 0:
                judge_end(self.row, self.contender, self.folder, self.whole.end, self.folder.name, self._good)
                return
            else:
                self._help(started)

    def _strike(self, started: Started) -> bool:
        """Wait for the moment and kill; False where the start ended by itself before."""
        if self.chooser.random() < ANYTIME:
            started.pause(self.chooser.uniform(0, STARTING))
        else:
            self._await_save(started, self.chooser.randint(1, SAVES))
            started.pause(self.chooser.uniform(0, AROUND * self.whole.save))
        if started.code() is None:
            started.kill()
        return started.code() == -signal.SIGKILL

    def _await_save(self, started: Started, number: int) -> None:
        """Wait until so many checkpoints have been begun."""
        before, begun = set(self.contender.numbered(self.folder)), 0

        def enough() -> bool:
            nonlocal before, begun
            now = set(self.contender.numbered(self.folder))
            begun += len(now - before)
            before = now
            return begun >= number

        started.until(enough, PATIENCE)

    def _remember(self, started: Started) -> None:
        """Count a kill, and what the start had come to."""
        self.row.tries += 1
        self._open += 1
        self._done = max(self._done, started.reached)
        self._had = self._had or self.contender.has_one(self.folder, started)
        found = self.contender.numbered(self.folder).values()
        self.inside += not all(self.contender.whole(path, self.whole.files) for path in found)

    def _went_on(self, began: int) -> None:
        """Judge the kills before a start that has begun to train."""
        if self._had and began == 0:
            self.row.unrecoverable += self._open
            self.nothing += self._open + self._stuck
            if self._open + self._stuck:
                self.row.fails(f"{self.folder.name}: nothing was left after {self._done} steps")
        else:
            self.row.resumed += self._open
            self._good += self._open
            self.by_hand += self._stuck
            self.row.lost = max(self.row.lost, self._done - began if self._open else 0)
        self._open = self._stuck = 0
        self._done = began

    def _help(self, started: Started) -> None:
        """A start that ended by itself: the kills before it made the run unrecoverable as it is."""
        self.row.unrecoverable += self._open
        self._stuck, self._open = self._stuck + self._open, 0
        self.row.fails(f"{self.folder.name}: ended with {started.code()} after {self._done} steps", started.text())
        if not self.contender.forget_newest(self.folder):
            raise RuntimeError(f"{self.contender.name} fails from its beginning:\n{started.text()[-3000:]}")

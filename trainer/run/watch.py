"""`limbeck watch`: how a run is doing, from its folder alone, which may lie on another machine.

Nothing is written and nothing is locked, so that any number of people may watch.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer.errors import ExperimentErrors
from trainer.experiment.plain_yaml import read_values
from trainer.run.folder import RunFolder
from trainer.run.held_out import FIGURES, in_words, main_figure
from trainer.run.pace import Pace, duration, figures
from trainer.run.run_status import (
    AGAIN_LATER,
    Life,
    check_run,
    how_it_ended,
    newest_checkpoint,
    read_lenient,
)
from trainer.run.text_curve import text_curve

NARROW, WIDE = 40, 100  # columns of a frame
CURVE = 8  # most rows of a curve
SHOWN = 4  # warnings
STRANGE = "a record of metrics.jsonl is not as a run writes it"
QUIET = 15.0  # seconds without a sign of life from which on they are shown
ENDING = 1.0  # seconds between the two looks at a run that has ended


class Tail:
    """The records of a metrics file that is being written, each read once.

    A line that is not whole yet, as a network file system may show it, is looked at again next time. A file that a
    resumed run has written anew is read from its beginning.

    Attributes:
        records: called with each record.
    """

    def __init__(self, file: Path, begin: Callable[[], None], add: Callable[[dict[str, Any]], None]) -> None:
        self.file, self._begin, self._add = file, begin, add
        self._at, self._inode = 0, None

    def read(self) -> None:
        """Read what has come since."""
        try:
            if not stat.S_ISREG(self.file.stat().st_mode):
                return
            with self.file.open("rb") as handle:
                found = os.fstat(handle.fileno())
                if found.st_ino != self._inode or found.st_size < self._at:
                    self._inode, self._at = found.st_ino, 0
                    self._begin()
                handle.seek(self._at)
                for line in handle:
                    if not (record := _record(line)):
                        return
                    self._at += len(line)
                    self._add(record)
        except OSError:  # it is not there yet, or cannot be reached now
            return


class Watched:
    """A training whose metrics are followed.

    Attributes:
        folder: its folder: the run's, or that of its teacher or control.
        pace: its speed.
        last: the newest record of a step; None before the first.
        loss, held_out: (step, value), the latter of the `figure`.
        figure: what is measured on held-out data.
        troubles: what went wrong, in words.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self._tail = Tail(self.folder.metrics, self._begin, self._add)
        self._begin()

    def read(self) -> None:
        """Read what has come since."""
        if self.last is None:
            self._begin()  # the plan may have come
        self._tail.read()

    def _begin(self) -> None:
        training, steps = _values(self.folder).get("training"), read_lenient(self.folder.plan).get("steps")
        training = training if isinstance(training, dict) else {}
        self.steps = steps if isinstance(steps, int) and steps > 0 else None
        every = [value if isinstance(value, int) and value > 0 else 10**9 for value in (
            training.get("evaluate_every"), training.get("checkpoint_every"))]
        self.pace, self.last = Pace(self.steps or 1, *every), None
        self.loss: list[tuple[float, float]] = []
        self.held_out: list[tuple[float, float]] = []
        self.figure = "bits_per_byte"
        self.troubles: list[str] = []

    def _add(self, record: dict[str, Any]) -> None:
        step = record["step"]
        try:
            self.pace.add(record)
            if "held_out" in record:
                self.figure = main_figure(record["held_out"])
                self.held_out.append((step, float(record["held_out"][self.figure])))
            elif record.get("loss") is not None:
                self.loss.append((step, float(record["loss"])))
                self.last = record
            if "nonfinite" in record:
                self.troubles.append(f"step {step}: non-finite loss or gradient, step skipped")
            if "exceeded" in record:
                self.troubles.append(f"step {step}: {record['exceeded'].get('problem', 'above the memory budget')}")
        except (TypeError, ValueError, KeyError, AttributeError):
            self.troubles.append(f"step {step}: {STRANGE}")


class Watch:
    """Looks at a run again and again.

    Args:
        path: the run's folder.

    Raises:
        UserError: it is no run's.
    """

    def __init__(self, path: Path) -> None:
        check_run(RunFolder(path))
        self.path, self.folder = path, RunFolder(path)
        self._followed: dict[Path, Watched] = {}

    def frame(self, columns: int, rows: int = 50) -> tuple[list[str], int | None]:
        """What is to be seen now, as lines of text, and the exit code if the run has ended; see `limbeck status`."""
        life, end = Life.of(self.folder), how_it_ended(self.folder)
        code, phase = self._ended(life, end)
        model = self._model(life)
        columns = max(NARROW, min(columns, WIDE))
        head = [f"{self._name(life)}  {phase}", *self._figures(model, columns)]
        notes = [*model.troubles, *(text for text in life.content.get("warnings") or () if isinstance(text, str))]
        foot = [line for note in notes[-SHOWN:] for line in note.split("\n")[:1]]
        height = min(CURVE, (rows - len(head) - len(foot) - 6) // 2 - 2)
        lines = [*head, *(self._curves(model, columns, height) if height >= 2 else ()), *foot]
        return [_printable(line)[:columns] for line in lines], code

    def _name(self, life: Life) -> str:
        name = life.content.get("name", _values(self.folder).get("name"))
        return name if isinstance(name, str) else self.path.name

    def _ended(self, life: Life, end: dict[str, Any] | None) -> tuple[int | None, str]:
        """The exit code, None while the run goes on, and the run's phase in words."""
        if end is None and life.lives:
            return None, self._now(life)
        if end is None and self.folder.finished:
            return 0, f"finished, see {self.folder.report}"
        if end is not None:
            return AGAIN_LATER if end["code"] == AGAIN_LATER else 1, f"ended: {end['said'].splitlines()[0]}"
        age = "" if life.age is None else f", {duration(life.age)} after its last sign of life"
        return 1, f"dead: it ended without a word, and not finished{age}"

    def _now(self, life: Life) -> str:
        content, parts = life.content, [life.phase]
        done, total, since = (content.get(key) for key in ("done", "total", "since"))
        if isinstance(done, int) and done > 0:
            of = f" of {total:,}" if isinstance(total, int) else ""
            parts.append(f"{done:,}{of} {content.get('unit')}")
        if isinstance(since, int | float):
            parts.append(f"for {duration(max(0.0, time.time() - since))}")
        if life.age > QUIET:
            parts.append(f"no sign of life for {duration(life.age)}")
        return ", ".join(parts)

    def _model(self, life: Life) -> Watched:
        """The training to show: the one that goes on, or else the run's own."""
        path = Path(os.path.normpath(self.path / life.training)) if life.lives else self.path
        if path not in self._followed:
            self._followed[path] = Watched(path)
        self._followed[path].read()
        return self._followed[path]

    def _figures(self, model: Watched, columns: int) -> list[str]:
        if model.last is None:
            place = model.folder.path  # which is made when its training begins
            there = place.is_relative_to(self.path) or place.exists() or place.absolute().parents[1].exists()
            return [] if there else [f"its folder is not to be seen from here: {model.folder.path}"]
        step, steps = model.pace.step, model.steps or model.pace.step
        full = round(20 * min(1.0, step / max(1, steps)))
        begin = f"step {step:,}/{steps:,} {'━' * full}{'─' * (20 - full)} {step / max(1, steps):.0%}"
        lines = [begin]
        try:
            parts = figures(model.last, model.pace)
        except (TypeError, ValueError, KeyError):
            parts = [STRANGE]
        if model.held_out:
            figure = FIGURES[model.figure]
            at, best = min(model.held_out, key=lambda point: -point[1] if figure.higher else point[1])
            last = in_words({model.figure: model.held_out[-1][1]}, model.figure)
            parts.append(f"held-out {last}, best {figure.shown(best)} at step {at:,}")
        if (checkpoint := newest_checkpoint(model.folder)) is not None:
            parts.append(f"newest checkpoint {checkpoint}")
        for part in parts:
            if len(lines[-1]) + 2 + len(part) <= columns:
                lines[-1] += f"  {part}"
            else:
                lines.append(part)
        return lines

    @staticmethod
    def _curves(model: Watched, columns: int, rows: int) -> list[str]:
        lines = []
        held_out = f"held-out, {FIGURES[model.figure].words}"
        for title, points in (("loss", model.loss), (held_out, model.held_out)):
            if len(points) > 1:
                lines += ["", title, *text_curve(points, columns, rows, model.steps)]
        return lines


class Looks(Protocol):
    """What is looked at: a run, or a sweep."""

    def frame(self, columns: int, rows: int = 50) -> tuple[list[str], int | None]:
        """See `Watch.frame`."""


def watch(looks: Looks, every: float, once: bool, console: Console, sleep: Callable[[float], None] = time.sleep
          ) -> int:
    """Show a run until it has ended, and return the exit code of `limbeck status`.

    Args:
        looks: the run, or sweep.
        every: seconds between two looks.
        once: whether to look only once; so it is without a terminal.
    """
    if once or not console.is_terminal:
        lines, code = looks.frame(console.width)
        print("\n".join(lines), file=console.file, flush=True)
        return 1 if code is None else code
    before = None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            lines, code = looks.frame(console.width, console.height)
            live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)
            if code is not None and code == before:  # twice: a run that ends needs a moment to write how
                return code
            before = code
            sleep(every if code is None else min(every, ENDING))


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is not whole, or no record."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _values(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_values(folder.experiment)[0]
    except (ExperimentErrors, OSError):
        return {}


def _printable(text: str) -> str:
    """The text without control characters: a folder may be from somebody else."""
    return "".join(character if character.isprintable() else "?" for character in text)

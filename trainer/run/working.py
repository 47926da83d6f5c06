"""Words before slow work, and how far it has come: on the terminal, in a log, and for `limbeck watch`.

Each part of a run that may take long is done inside `working`. Short work says nothing. Work that goes on is named
after two seconds at most, so that nobody looks at an idle terminal for more than five; how far it has come follows
where it reports that (`strategies.common.progress`), and how long it took when it is over.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from strategies.common.progress import listening
from trainer.run.bars import Bars
from trainer.run.metrics import bars, console
from trainer.run.pace import duration

SILENT = 2.0  # seconds that work goes on before it is named
SLOW = 5.0  # seconds that work has to take for its end to be worth a line
BETWEEN = 30.0  # seconds between two lines on how far work has come, where there is no terminal for a bar
TICK = 0.5  # seconds between looks at the clock

_going: list[Work] = []  # outermost first
listeners: list[Callable[[], None]] = []  # called when work on another model begins or ends
warnings: deque[str] = deque(maxlen=5)
"""The newest warnings of this process's run, for `limbeck watch`."""


class Work:
    """A part of a run that is being done.

    Args:
        name: the experiment, with which each line begins.
        words: what is being done, as in "planning memory"; what follows a comma is for the first line only.
        quiet: whether nothing is printed, because the work prints lines of its own.
        at_once: whether it is named at once instead of after `SILENT` seconds.
        clock: returns seconds.
        say: prints a line.
        bars: where a bar is shown; None where there is no terminal.
        facts: what else `limbeck watch` is to know.

    Attributes:
        began: when, in seconds since the epoch.
        done, total, unit: how much is done of how much, and of what; `total` is None while that is not known.
    """

    def __init__(self, name: str, words: str, *, quiet: bool = False, at_once: bool = False,
                 clock: Callable[[], float] = time.monotonic, say: Callable[[str], Any] = console.print,
                 bars: Bars | None = None, facts: dict[str, str] | None = None) -> None:
        self.name, self.words, self.quiet, self.facts = name, words, quiet, facts or {}
        self.began, self.done, self.total, self.unit = time.time(), 0, None, ""
        self._clock, self._say, self._bars, self._bar = clock, say, bars, None
        self._since, self._named = clock(), False
        self._next = SLOW if at_once and bars is None else SILENT
        if at_once:
            self._name()

    @property
    def short(self) -> str:
        """What is being done, without details."""
        return self.words.partition(",")[0]

    def report(self, unit: str, done: int, total: int | None) -> None:
        """Take note of how far the work has come."""
        self.unit, self.done, self.total = unit, done, total

    def tick(self) -> None:
        """Say what is due by now."""
        if self.quiet:
            return
        seconds = self._clock() - self._since
        if seconds < self._next:
            self._move(seconds)
            return
        if not self._named:
            self._name()
        elif self._bars is None and self.done:
            self._say(f"{self.name}: {self.short}, {self._far(seconds)}")
        if self._bars is not None and self._bar is None:
            self._bar = self._bars.add(f"{self.name}  {self.short}", self.total, self.done)
        self._move(seconds)
        self._next = seconds + (TICK if self._bars is not None else BETWEEN)

    def end(self, failed: bool = False) -> None:
        """Remove the bar; say how long slow work took, unless it failed, which is told elsewhere."""
        seconds = self._clock() - self._since
        if self._bar is not None:
            self._bars.remove(self._bar)
        if seconds >= SLOW and not self.quiet and not failed:
            self._say(f"{self.name}: {self.short} took {duration(seconds)}")

    def _name(self) -> None:
        self._named = True
        self._say(f"{self.name}: {self.words}")

    def _move(self, seconds: float) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, self.done, self.total, self._far(seconds) or duration(seconds))

    def _far(self, seconds: float) -> str:
        """How much is done, and how long the rest takes at the same speed; "" where nothing is counted."""
        if not self.total:
            return f"{self.done:,} {self.unit}" if self.done else ""
        left = f", {duration(seconds / self.done * (self.total - self.done))} left" if self.done else ""
        return f"{self.done:,} of {self.total:,} {self.unit}{left}"


@contextmanager
def working(name: str, words: str, *, quiet: bool = False, at_once: bool = False, to_stderr: bool = False,
            **facts: str) -> Iterator[Work]:
    """Context manager for work that may take long; see `Work`. Only the first process says anything."""
    main = int(os.environ.get("RANK", 0)) == 0
    say, shown = (_to_stderr, None) if to_stderr else (console.print, bars if console.is_terminal else None)
    work = Work(name, words, quiet=quiet or not main, at_once=at_once and main, say=say, bars=shown, facts=facts)
    _going.append(work)
    _announce(work)
    over = threading.Event()
    thread = None if work.quiet else threading.Thread(target=_ticks, args=(work, over), daemon=True, name="words")
    if thread is not None:
        thread.start()
    failed = True
    try:
        with nullcontext() if quiet else listening(work.report):
            yield work
        failed = False
    finally:
        over.set()
        if thread is not None:
            thread.join()
        _going.remove(work)
        _announce(work)
        work.end(failed)


def going() -> list[Work]:
    """All that is being done now, the outermost work first."""
    return list(_going)


def noted(text: str) -> str:
    """The text; a warning is kept for `limbeck watch`."""
    if text.startswith("warning"):
        warnings.append(text)
    return text


def _announce(work: Work) -> None:
    for listener in listeners if work.facts else ():
        listener()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ticks(work: Work, over: threading.Event) -> None:
    while not over.wait(TICK):
        work.tick()

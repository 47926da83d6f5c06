"""The bars at the bottom of a terminal, which all that is going on shares: rich draws one display at a time."""

from __future__ import annotations

from threading import RLock

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

WIDE = 130  # columns that a bar with all its figures needs


class Bars:
    """Bars that are shown together, from when the first is added until the last is removed.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._progress, self._shown = console, None, 0
        self._lock = RLock()  # work is shown from threads

    @property
    def width(self) -> int:
        """Columns of a bar alone."""
        return 20 if self._console.width >= WIDE else 8

    def add(self, words: str, total: int | None, done: int = 0) -> TaskID:
        """Show one more bar, which moves to and fro where the total is not known."""
        with self._lock:
            if self._progress is None:
                self._progress = self._new()
                self._progress.start()
            self._shown += 1
            return self._progress.add_task(words, total=total, completed=done, figures="")

    def update(self, bar: TaskID, done: int, total: int | None, figures: str = "") -> None:
        """Move a bar, and change the text behind it."""
        if self._progress is not None:
            self._progress.update(bar, completed=done, total=total, figures=figures)

    def remove(self, bar: TaskID, keep: bool = False) -> None:
        """Remove a bar; with `keep` it stays on the terminal if it is the last one."""
        with self._lock:
            if self._progress is None:
                return
            self._shown -= 1
            if not (keep and self._shown == 0):
                self._progress.remove_task(bar)
            if self._shown == 0:
                self._progress.stop()
                self._progress = None

    def _new(self) -> Progress:
        whole = Column(no_wrap=True, overflow="crop", min_width=9)
        return Progress(TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                        BarColumn(bar_width=self.width), _Count(table_column=whole),
                        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                        console=self._console)


class _Count(ProgressColumn):
    """How many are done of all, where that is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")

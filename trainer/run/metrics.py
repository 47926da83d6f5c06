"""Output of a run in progress: `metrics.jsonl`, and a progress bar or plain log lines."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainer.files import write_atomically
from trainer.run.bars import Bars
from trainer.run.folder import not_written
from trainer.run.pace import Pace, figures, fitting
from trainer.run.pace import readable as readable  # for all who print bytes

if TYPE_CHECKING:
    import torch

NEWLINE = b"\n"
LINE = 120  # columns of a line where there is no terminal

# On a terminal rich wraps and colors; elsewhere lines are not wrapped, whatever width is assumed for a pipe.
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), markup=False)
bars = Bars(console)


class Metrics:
    """Writer of `metrics.jsonl`, one JSON object per line, on the main process.

    A resumed run drops the lines of steps that it will run again. If the disk is full, lines are kept in memory until
    there is room.

    Attributes:
        pace: what the lines of the run so far say about its speed, those of earlier starts included.
    """

    def __init__(self, file: Path, active: bool, step: int, pace: Pace | None = None):
        self._handle, self._waiting, self.pace = None, b"", pace or Pace(1, 1, 1)
        if not active:
            return
        kept = [line for line in read_lines(file) if line["step"] <= step] if file.exists() else []
        for line in kept:
            self.pace.add(line)
        self.pace.start()
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._handle = file.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, unbuffered; it is in the file on return, unless the disk is full."""
        self.pace.add(record)
        if self._handle:
            self._waiting += json.dumps({name: _plain(value) for name, value in record.items()}).encode() + b"\n"
            self._flush()

    def close(self) -> None:
        """Write pending lines as far as there is room, warn if any are lost, and close the file."""
        if self._handle:
            self._flush()
            self._handle.close()
            if self._waiting:  # part of the first may have been written; readers skip an incomplete last line
                console.print(f"warning: {self._waiting.count(NEWLINE)} last lines of {self._handle.name} are lost: "
                              "there is too little room to write them")

    def _flush(self) -> None:
        """Write pending bytes; after a partial write, the next call continues from there."""
        while self._waiting:
            try:
                taken = self._handle.write(self._waiting)
            except OSError:
                return
            self._waiting = self._waiting[taken:]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file; an incomplete last line, as after a crash, is skipped.

    Raises:
        UserError: any other line is malformed.
    """
    records = []
    lines = file.read_bytes().split(b"\n")  # at once: a run may be writing the rest of its last line
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("it is no record of a step")
            records.append(record)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise not_written(file, f"line {number}: {error}") from error
    return records


class ProgressReporter:
    """Shows progress on the main process: a bar on a terminal, elsewhere a line every `every` steps.

    Args:
        pace: the run's speed, from which the time left follows.
    """

    def __init__(self, name: str, steps: int, done: int, every: int, active: bool, pace: Pace | None = None):
        self.name, self.steps, self.every, self.active = name, steps, every, active
        self.pace = pace or Pace(steps, steps, steps)
        self._bar = bars.add(name, steps, done) if active and console.is_terminal else None

    def step(self, number: int, record: dict[str, Any]) -> None:
        """Show optimizer step `number`, counted from 1."""
        parts = figures(record, self.pace)
        if self._bar is not None:
            beside = len(self.name) + 2 * len(str(self.steps)) + bars.width + 5
            bars.update(self._bar, number, self.steps, fitting(parts, console.width - beside))
        elif self.active and (number % self.every == 0 or number == self.steps):
            begin = f"{self.name}  step {number}/{self.steps}  "
            console.print(begin + fitting(parts, LINE - len(begin)))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.active:
            console.print(f"{self.name}  {text}")

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar is not None:
            bars.remove(self._bar, keep=True)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: JSON has no NaN or infinity, so these become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def memory_peak(device: torch.device) -> tuple[int, str]:
    """Peak memory so far in bytes, and what it measures: "cuda" for CUDA's allocator, "rss" for resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device), "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "rss"

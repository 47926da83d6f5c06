"""Output of a run in progress: `metrics.jsonl`, and a progress bar or plain log lines."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from trainer.files import write_atomically
from trainer.run.folder import not_written

NEWLINE = b"\n"
WIDE = 130  # columns that the bar with all its figures needs

# On a terminal rich wraps and colors; elsewhere lines are not wrapped, whatever width is assumed for a pipe.
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), markup=False)


class Metrics:
    """Writer of `metrics.jsonl`, one JSON object per line, on the main process.

    A resumed run drops the lines of steps that it will run again. If the disk is full, lines are kept in memory until
    there is room.
    """

    def __init__(self, file: Path, active: bool, step: int):
        self._handle, self._waiting = None, b""
        if not active:
            return
        kept = [line for line in read_lines(file) if line["step"] <= step] if file.exists() else []
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._handle = file.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, unbuffered; it is in the file on return, unless the disk is full."""
        if self._handle:
            self._waiting += json.dumps(record).encode() + b"\n"
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
    """Shows progress on the main process: a bar on a terminal, elsewhere a line every `every` steps."""

    def __init__(self, name: str, steps: int, done: int, every: int, active: bool):
        self.name, self.steps, self.every, self.active = name, steps, every, active
        self._bar = None
        if active and console.is_terminal:
            whole = {"table_column": Column(no_wrap=True, overflow="crop", min_width=9)}
            self._bar = Progress(TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                                 BarColumn(bar_width=20 if console.width >= WIDE else 8), MofNCompleteColumn(**whole),
                                 TimeRemainingColumn(**whole), TextColumn("{task.fields[figures]}"), console=console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=steps, completed=done, figures="")

    def step(self, number: int, record: dict[str, Any]) -> None:
        """Show optimizer step `number`, counted from 1."""
        if self._bar:
            self._bar.update(self._task, completed=number, figures=_figures(record, console.width < WIDE))
        elif self.active and (number % self.every == 0 or number == self.steps):
            console.print(f"{self.name}  step {number}/{self.steps}  {_figures(record)}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.active:
            console.print(f"{self.name}  {text}")

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar:
            self._bar.stop()


def _figures(record: dict[str, Any], short: bool = False) -> str:
    if record["loss"] is None:
        return "no target tokens"
    parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if short:  # metrics.jsonl has the rest
        return "  ".join(parts)
    parts.append(f"grad norm {record['gradient_norm']:.3g}")
    if record["loss_scale"] != 1:
        parts.append(f"scale {record['loss_scale']:g} ({record['skipped']} skipped)")
    return "  ".join([*parts, f"{record['memory_kind']} peak {readable(record['memory_peak'])}"])


def memory_peak(device: torch.device) -> tuple[int, str]:
    """Peak memory so far in bytes, and what it measures: "cuda" for CUDA's allocator, "rss" for resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "rss"


def readable(count: float) -> str:
    """Format a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"

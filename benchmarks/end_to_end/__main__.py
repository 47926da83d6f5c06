"""Training as a person runs it, ours beside transformers' Trainer, TRL's SFT and TRL's GKD: tokens/s and memory.

    python -m benchmarks.end_to_end [--vocabulary 8192 32768 151936] [--dtypes fp32 bf16] [--busy] [--json FILE]

Each side is a process of its own with the same weights, rows, optimizer and loss: a 12 M student (at 32,768 tokens of
vocabulary), taught by a 36 M teacher, 2,048 tokens a step. All wait at the beginning of a step and take turns of a few
steps, so that what else the machine does falls on all; `ratio` is the median over rounds of our tokens/s over theirs in
the same round. The first turn warms up and is not counted. Losses are compared step by step: where they differ by more
than the tolerance (relative, 1e-4 in fp32, 1e-3 in bf16, where logits of the peers are rounded) the row is void. Peaks
are of resident memory up to the last step, whole and above what a process held after its imports. With `--busy` another
process multiplies matrices all the while. Rows of other settings that FILE has already are kept. Peers:
`pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end.contestant import CONTESTANTS
from benchmarks.end_to_end.end_to_end_table import table
from benchmarks.end_to_end.material import BATCH, LENGTH, Setting, rows_in_order
from benchmarks.rematerialization.frontier import machine

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
BUSY = "import torch; torch.set_num_threads(1); one = torch.randn(700, 700)\nwhile True: one @ one"


class Side:
    """A contestant's process."""

    def __init__(self, name: str, room: Path, threads: int) -> None:
        self.name, self.log = name, (room / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.end_to_end.contestant", name, str(room)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                 "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"})
        self.last: dict[str, Any] = {}
        self.answer()

    def answer(self) -> Any:
        """Its next line."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{Path(self.log.name).read_text()[-3000:]}")
        return json.loads(line)

    def run(self, steps: int) -> float:
        """Seconds of some steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.last = self.answer()
        return self.last["seconds"]


def main(arguments: list[str] | None = None) -> int:
    """Run all settings, print, and write what was found."""
    chosen = parser().parse_args(arguments)
    found = {"machine": machine(chosen.device), "threads": chosen.threads, "busy": chosen.busy,
             "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")
                          if find_spec(name)}, "rows": []}
    if chosen.json and chosen.json.exists():
        found["rows"] = json.loads(chosen.json.read_text())["rows"]
    for task in chosen.tasks:
        for vocabulary in chosen.vocabulary:
            for dtype in chosen.dtypes:
                steps = chosen.warm_up + chosen.rounds * chosen.turn
                rows = compared(Setting(task, vocabulary, dtype, steps, chosen.device), chosen)
                print(table(rows), flush=True)
                found["rows"] = [*(one for one in found["rows"] if _setting(one) != _setting(rows[0])), *rows]
                if chosen.json:  # a long run that is cut off keeps what it has found
                    chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + table(found["rows"]))
    return 0


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["vocabulary"], row["dtype"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tasks", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    made.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768, 151936])
    made.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    made.add_argument("--rounds", type=int, default=5, help="turns of each side that count")
    made.add_argument("--turn", type=int, default=3, help="steps of a turn")
    made.add_argument("--warm-up", type=int, default=4, help="steps before")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: its peaks are the allocator's")
    made.add_argument("--busy", action="store_true", help="beside another process at work")
    made.add_argument("--json", type=Path)
    return made


def compared(setting: Setting, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant of a setting."""
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        setting.write(room)
        torch.save(rows_in_order(room), room / "rows.pt")
        sides = [Side(name, room, chosen.threads) for name in CONTESTANTS[setting.task]
                 if not name.startswith("trl") or find_spec("trl")]
        with another_job(chosen.busy):
            for side in sides:
                side.run(chosen.warm_up)
            seconds = [[side.run(chosen.turn) for side in sides] for _ in range(chosen.rounds)]
        for side in sides:
            side.process.wait()
    return [row(setting, side, sides[0], [turn[number] for turn in seconds], [turn[0] for turn in seconds], chosen)
            for number, side in enumerate(sides)]


def row(setting: Setting, side: Side, ours: Side, seconds: list[float], our_seconds: list[float],
        chosen: argparse.Namespace) -> dict[str, Any]:
    """What was found of a contestant: tokens/s, how many times faster we were, peaks, how far its losses are off."""
    tokens = chosen.turn * BATCH * LENGTH
    losses = list(zip(side.last["losses"], ours.last["losses"], strict=True))
    off = max(abs(theirs / mine - 1) for theirs, mine in losses)
    return {"task": setting.task, "vocabulary": setting.vocabulary, "dtype": setting.dtype, "contestant": side.name,
            "tokens_per_second": tokens / statistics.median(seconds),
            "ratio": statistics.median(theirs / mine for theirs, mine in zip(seconds, our_seconds, strict=True)),
            "peak_bytes": side.last["peak"], "peak_above_imports": side.last["peak"] - side.last["imported"],
            "largest_loss_difference": off, "void": off > TOLERANCE[setting.dtype], "rounds": chosen.rounds}


@contextmanager
def another_job(wanted: bool) -> Iterator[None]:
    """Within the context another process keeps a core at work."""
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if wanted else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()


if __name__ == "__main__":
    raise SystemExit(main())

"""A disk that fills while a run is on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.faults.contenders import Limbeck
from benchmarks.faults.judging import PATIENCE, End, Row, gone_on, judge_end, undisturbed
from benchmarks.faults.processes import Started

OPTIONS = ("training.steps=20", "training.checkpoint_every=2", "training.evaluate_every=20")
FULL, ROOM_AGAIN = 5, 13  # steps after which the disk is filled, and has room again
CHECKPOINTS = 6  # that fit on the disk


def disk_row(limbeck: Limbeck, room: Path) -> Row:
    """Fill a small file system under a run: for a while, to its end, and with a kill while it is full."""
    limbeck = replace(limbeck, options=OPTIONS)
    row = Row("disk fills", limbeck.name, "1 process, forked, on a small tmpfs")
    end = undisturbed(limbeck, room / "whole")
    size = CHECKPOINTS * sum(file.stat().st_size for file in limbeck.newest(room / "whole").iterdir())
    for case in CASES:
        with small_disk(room / case.__name__, size) as folder:
            if folder is None:
                row.remarks.append("skipped: this user may not mount a tmpfs")
                break
            case(row, limbeck, folder, end)
    return row


def on_full_disk(limbeck: Limbeck, folder: Path) -> tuple[Started, Path]:
    """A run whose disk was filled, some steps later, and the file that fills it."""
    started = limbeck.start(folder)
    started.until(lambda: started.reached >= FULL, PATIENCE)
    ballast = fill(folder)
    started.until(lambda: started.reached >= ROOM_AGAIN, PATIENCE)
    return started, ballast


def full_for_a_while(row: Row, limbeck: Limbeck, folder: Path, end: End) -> None:
    """It has to live through it, and to be saved again afterwards."""
    started, ballast = on_full_disk(limbeck, folder)
    ballast.unlink()
    code = started.wait(PATIENCE)
    if code == 0:
        row.tries += 1
        row.resumed += 1
        judge_end(row, limbeck, folder, end, "full for a while")
        row.remarks.append("lives through a full disk")
        return
    row.fails(f"full for a while: it ended with {code}", started.text())
    gone_on(row, limbeck, folder, end, "full for a while", started.reached)


def full_and_killed(row: Row, limbeck: Limbeck, folder: Path, end: End) -> None:
    """It goes on from the last checkpoint for which there was room."""
    started, ballast = on_full_disk(limbeck, folder)
    started.kill()
    ballast.unlink()
    gone_on(row, limbeck, folder, end, "full and killed", started.reached)


def full_to_the_end(row: Row, limbeck: Limbeck, folder: Path, end: End) -> None:
    """What ends without room goes on once there is some."""
    started = limbeck.start(folder)
    started.until(lambda: started.reached >= FULL, PATIENCE)
    ballast = fill(folder)
    started.wait(PATIENCE)
    ballast.unlink()
    gone_on(row, limbeck, folder, end, "full to the end", started.reached)


CASES = (full_for_a_while, full_and_killed, full_to_the_end)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path | None]:
    """A run folder on a file system of its own, of so many bytes; None where it may not be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    try:
        yield place if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path) -> Path:
    """Take all the space that is left with one file."""
    ballast = folder / ".ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast

"""Files of the newest checkpoint that are cut off, changed in one bit, or missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.contenders import Contender, names
from benchmarks.faults.judging import PATIENCE, Row, gone_on, undisturbed

EVERY, KILLED, STEPS = 6, 13, 16  # steps between checkpoints; the step after which the run is killed; of the run
OURS = (f"training.checkpoint_every={EVERY}", f"training.steps={STEPS}")
PEERS = ("--save-every", str(EVERY), "--steps", str(STEPS))


def cut_off(file: Path) -> None:
    """Its second half is gone."""
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def flip(file: Path) -> None:
    """One bit near its end, among the numbers of a tensor, is another."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1 << 6
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": cut_off, "bit flipped": flip, "missing": Path.unlink}


def damage_rows(contender: Contender, room: Path, what: str, files: tuple[str, ...] | None = None, **how: Any
                ) -> list[Row]:
    """For each damage a row: done to each file of the newest checkpoint in turn, or to those whose names begin so."""
    end = undisturbed(contender, room / "whole", **how)
    base = interrupted(contender, room / "base", **how)
    newest = contender.newest(base)
    every = sorted(name for name in names(newest) if files is None or name.startswith(files))
    processes = how.get("processes", 1)
    rows = []
    for damage, do in DAMAGES.items():
        row = Row(f"{damage} file of the newest checkpoint", contender.name + what,
                  f"{processes} process{'es' if processes > 1 else ''}, forked")
        for name in every:
            folder = room / f"{damage.replace(' ', '-')}-{name}"
            shutil.copytree(base, folder)
            do(contender.newest(folder) / name)
            gone_on(row, contender, folder, end, f"{name} {damage}", KILLED, **how)
            shutil.rmtree(folder)
        silent = row.resumed - row.bitwise
        row.remarks.append(f"each of {', '.join(every)}" if not silent else
                           f"{silent} finished without a word as something else")
        rows.append(row)
    return rows


def interrupted(contender: Contender, folder: Path, **how: Any) -> Path:
    """A run killed between two saves, with two finished checkpoints."""
    started = contender.start(folder, **how)

    def there() -> bool:
        kept = contender.numbered(folder).values()
        return started.reached >= KILLED and sum(not path.name.startswith(".") for path in kept) == 2

    if not started.until(there, PATIENCE):
        raise RuntimeError(f"{contender.name} ended before it could be killed:\n{started.text()[-3000:]}")
    started.kill()
    return folder

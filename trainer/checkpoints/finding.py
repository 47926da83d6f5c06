"""Finds the checkpoint to resume from, which is the newest intact one, and removes or sets aside the others."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.checkpoints.manifest import NAME, Unreadable, read_manifest, wrong_with
from trainer.errors import RunFailed

_NAME = re.compile(r"step-\d{8,}")

Gather = Callable[[list[Any]], list[Any]]
"""Takes a list of one object on every process, and returns the objects of all processes in rank order."""


def listed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)),
                  key=lambda path: int(path.name.partition("-")[2]))


def latest(folder: Path) -> Path | None:
    """The newest committed checkpoint, without checking whether it is intact."""
    return max(listed(folder), default=None, key=lambda path: int(path.name.partition("-")[2]))


def progress(folder: Path) -> tuple[int, int]:
    """Steps done by the newest committed checkpoint and the rows that these have taken; zeros if there is none."""
    newest = latest(folder)
    try:
        state = {} if newest is None else read_manifest(newest)
    except (Unreadable, OSError):  # said when the run resumes, from the one before
        state = {}
    rows = state.get("rows")
    return (state["step"], rows) if type(rows) is int else (0, 0)


def newest_good(folder: Path, *, rank: int = 0, ranks: int = 1, gather: Gather = list,
                say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint that verifies; None if there is no checkpoint at all. A collective call.

    Newer ones that fail are reported and renamed, so that their steps can be saved again. What a killed run left
    half-written is removed.

    Raises:
        RunFailed: there are checkpoints but none verifies, or the processes see different ones.
    """
    if rank == 0:
        remove_leftovers(folder)
    names = [path.name for path in reversed(listed(folder))]
    every = gather([names])
    if any(other != names for other in every):
        raise RunFailed(f"the processes see different checkpoints in {folder}: "
                        f"{'; '.join(', '.join(other[:2]) or 'none' for other in every)}.\n"
                        "  -> use a run.folder on storage that all machines share")
    passed: dict[str, str] = {}
    for name in names:
        wrong = next(filter(None, gather([wrong_with(folder / name, rank, ranks)])), None)
        if wrong is None:
            for damaged, what in passed.items():
                kept = set_aside(folder / damaged) if rank == 0 else None
                say(f"passed over the checkpoint {damaged}: {what}; it is kept as {kept}")
            return folder / name
        passed[name] = wrong
    if not passed:
        return None
    each = "".join(f"\n  {name}: {what}" for name, what in passed.items())
    raise RunFailed(f"there is no checkpoint in {folder} to go on from; none is as it was written:{each}\n"
                    "  -> put one back from a copy, or move that folder away and start the same command again: the run "
                    "then begins anew")


def best_kept(folder: Path) -> Path | None:
    """The checkpoint of the best evaluation, as the newest checkpoint knows it that names one which is there.

    A best checkpoint that could not be written, for example to a full disk, is passed over for the one before it.
    """
    for checkpoint in reversed(listed(folder)):
        with suppress(Unreadable):
            best = read_manifest(checkpoint).get("best")
            step = best.get("step") if isinstance(best, dict) else None
            if type(step) is int and (folder / NAME.format(step)).is_dir():
                return folder / NAME.format(step)
    return None


def set_aside(checkpoint: Path) -> str:
    """Rename a damaged checkpoint so that nothing takes it for one, and return the new name."""
    name = first = f"damaged-{checkpoint.name}"
    number = 1
    while os.path.lexists(checkpoint.with_name(name)):
        number += 1
        name = f"{first}-{number}"
    os.rename(checkpoint, checkpoint.with_name(name))
    return name


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that were being written or deleted when a run was killed."""
    for path in folder.glob(".step-*"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint folder; if it is a link, only the link.

    The folder is renamed first, so that a half-deleted one never has the name of a checkpoint.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.removed")
        if os.path.lexists(hidden):
            remove(hidden)
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path)

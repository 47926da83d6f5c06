"""Where a data set comes from that a teacher has generated: the file beside it, and what a run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.files import read_object

PROVENANCE = "provenance.json"
DATA_FILE = "train.jsonl"
KIND = "answers of a teacher"
LARGEST = 2**20  # bytes of a provenance file
LONGEST = 600  # characters of a note


def provenance_of(path: str) -> dict[str, Any] | None:
    """The provenance beside generated data, or None.

    Args:
        path: of the data, a folder or a file in it.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not Path(path).exists() or Path(path).is_file() and Path(path).name != DATA_FILE:
        return None
    try:
        found = read_object(folder / PROVENANCE, LARGEST)
    except (OSError, ValueError):
        return None
    return found if found.get("kind") == KIND else None


def notes_on_provenance(path: str) -> list[str]:
    """A note for the user, the report and the model card on data that a teacher has generated; none for other data."""
    found = provenance_of(path)
    if found is None:
        return []
    try:
        said = f"{described(found)}{_changed(path, found)}"
    except (LookupError, TypeError, ValueError, AttributeError):  # somebody has edited the file
        return []
    return ["".join(one for one in said if one.isprintable())[:LONGEST]]  # it may be of anybody, and is printed


def described(found: dict[str, Any]) -> str:
    """One line on who answered which prompts, and how."""
    teacher, prompts, counts = found["teacher"], found["prompts"], found["counts"]
    identity = f"commit {teacher['commit'][:12]}" if teacher["commit"] else f"weights {teacher['weights'][:12]}"
    return (f"{counts['written']:,} answers of {name_of(teacher['path'])} ({identity}) to {prompts['count']:,} prompts "
            f"of {name_of(prompts['path'])}: {said_of(found['decoding'])}, generated {found['finished'][:10]}")


def said_of(decoding: dict[str, Any]) -> str:
    """How answers were decoded, in words."""
    how = f"beam search with {decoding['beams']} beams" if decoding["beams"] > 1 else \
        f"sampled at temperature {decoding['temperature']:g}" if decoding["temperature"] else "greedy"
    nucleus = f" and top_p {decoding['top_p']:g}" if decoding["top_p"] < 1 else ""
    many = f", {decoding['answers']} to each" if decoding["answers"] > 1 else ""
    return f"{how}{nucleus}{many}, of at most {decoding['new_tokens']:,} tokens"


def name_of(path: str) -> str:
    """A hub id, or the end of a local path only: what is written from it may be published."""
    parts = Path(path).parts
    if not Path(path).is_absolute() and len(parts) == 2 and not Path(path).exists():
        return path
    return "/".join(parts[-2 if parts[-1:] == ("student",) else -1:])


def _changed(path: str, found: dict[str, Any]) -> str:
    file = Path(path) / DATA_FILE if Path(path).is_dir() else Path(path)
    same = file.is_file() and file.stat().st_size == found["files"][DATA_FILE]["bytes"]
    return "" if same else "; the data has been changed since"

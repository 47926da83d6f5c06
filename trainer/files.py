"""Files: written whole or not at all; JSON of other people read as an object or with one clear error; short hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def read_object(file: Path, most: int) -> dict[str, Any]:
    """The JSON object that is all of a file.

    Args:
        most: bytes that such a file may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file or larger, or holds something else; said without the file's name.
    """
    if not file.is_file():
        raise ValueError("no file")
    if file.stat().st_size > most:
        raise ValueError(f"a file of {file.stat().st_size:,} bytes, over {most:,}")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {(str(error).splitlines() or [''])[0][:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"no JSON object, but a {type(values).__name__}")
    return values


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whenever the process dies or the disk is full.

    Raises:
        OSError: it could not be written; the old one is as it was.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a link
        with open(partial, "x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def fingerprint(values: Any) -> str:
    """Short hash of plain data, for the names of cached things."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

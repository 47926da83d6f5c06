"""File helpers: atomic writes, reading untrusted JSON objects, and short hashes of plain data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def read_object(file: Path, most: int) -> dict[str, Any]:
    """Read a file that consists of one JSON object; see `read_value`."""
    return read_value(file, most, dict)


def read_value(file: Path, most: int, kind: type) -> Any:
    """Read a file that consists of one JSON value.

    Args:
        most: maximum size of the file in bytes.
        kind: dict for an object, list for a list.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a regular file, too large, or not such a value; the message does not name the file.
    """
    if not file.is_file():
        raise ValueError("no file")
    if file.stat().st_size > most:
        raise ValueError(f"a file of {file.stat().st_size:,} bytes, over {most:,}")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {(str(error).splitlines() or [''])[0][:300]}") from error
    if not isinstance(values, kind):
        raise ValueError(f"no JSON {'object' if kind is dict else kind.__name__}, but a {type(values).__name__}")
    return values


def write_atomically(file: Path, text: str) -> None:
    """Replace a file atomically: it has either its old or its new content, even if the process dies or the disk fills.

    Raises:
        OSError: the file could not be written; the old one is unchanged.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a symlink, which must not be followed
        with open(partial, "x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def fingerprint(values: Any) -> str:
    """Short hash of plain data, used in the names of cache entries."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

"""JSON of other people: an object or one clear error, and never more memory than a file may have."""

from __future__ import annotations

import json
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

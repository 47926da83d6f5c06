"""Parse sizes in bytes such as "6GiB"."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
         "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: int | float | str) -> int:
    """Parse a number of bytes, or text such as "6GiB", "800 MB" or "1.5e9".

    Raises:
        ValueError: it is not a positive number of bytes.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(text).replace("_", "").lower())
    if found is not None and found[2] not in UNITS:
        raise ValueError(f"{text!r} is not a number of bytes: units are KB, MB, GB, TB (powers of 1000) and KiB, MiB, "
                         "GiB, TiB (of 1024)")
    try:
        count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except (ValueError, OverflowError):
        count = 0
    if count <= 0 or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a number of bytes above 0; write for example 6GiB, 800MB or 6442450944")
    return count

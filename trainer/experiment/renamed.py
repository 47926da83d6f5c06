"""Renamed values of experiment files, so that a run started with an earlier version resumes under the new names."""

from __future__ import annotations

import copy
from typing import Any

# Dotted key -> old value -> new value. In a new experiment an old value is an error, which suggests the new one.
VALUES = {"student.quantization.scales": {"learnt": "learned"}}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Translate experiment values written by an earlier version to the names of this version; returns a copy."""
    values = copy.deepcopy(values)
    for key, names in VALUES.items():
        *above, last = key.split(".")
        node: Any = values
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = names.get(node[last], node[last])
    return values

"""Values of an experiment that had another name in an earlier version: a run of that time goes on under the new one."""

from __future__ import annotations

import copy
from typing import Any

# Dotted key -> what was written -> what is written now. A person who writes the old one is answered with the new one.
VALUES = {"student.quantization.scales": {"learnt": "learned"}}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an experiment that an earlier version wrote, as this version writes them."""
    values = copy.deepcopy(values)
    for key, names in VALUES.items():
        *above, last = key.split(".")
        node: Any = values
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = names.get(node[last], node[last])
    return values

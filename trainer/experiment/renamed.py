"""Values of earlier versions, so that a run started with one of them goes on under new names, and as it began."""

from __future__ import annotations

import copy
from typing import Any

# Dotted key -> old value -> new value. In a new experiment an old value is an error, which suggests the new one.
VALUES = {"student.quantization.scales": {"learnt": "learned"}}

# Dotted key -> what versions without the key did, where today's default is another. A node that is null has no keys.
BEFORE = {"objective.features.scale": "none", "objective.features.projections": "random",
          "objective.divergence.normalized": False}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Translate experiment values written by an earlier version to the names and keys of this version; returns a copy.

    The values must be a whole experiment, defaults included, as a run folder has it.
    """
    values = copy.deepcopy(values)
    for key, before in BEFORE.items():
        node, name = _node_of(values, key)
        if node is not None:
            node.setdefault(name, before)
    for key, names in VALUES.items():
        node, name = _node_of(values, key)
        if node is not None and isinstance(node.get(name), str):
            node[name] = names.get(node[name], node[name])
    return values


def _node_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The node that a key is in, or None, and the key's own name."""
    *above, name = key.split(".")
    node: Any = values
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name

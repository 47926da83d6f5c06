"""The configuration references: every key of an experiment and of a sweep, from the trees that read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from trainer.experiment.explain import schema
from trainer.sweep.sweep_file import Sweep

LIMITS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}",
          "minLength": "{} character or more", "pattern": "matches `{}`"}


def configuration() -> str:
    """A section for each node of the tree: what it is for, and a table of its keys."""
    tree = schema()
    return "\n".join(_sections(tree, tree, ""))


def sweep_file() -> str:
    """The same for sweep files."""
    tree = schema(Sweep)
    return "\n".join(_sections(tree, tree, ""))


def _sections(tree: dict[str, Any], node: dict[str, Any], key: str) -> Iterator[str]:
    inner = []
    yield from _heading(node, key)
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for name, field in node["properties"].items():
        below = _node(tree, field)
        dotted = f"{key}.{name}" if key else name
        if below is not None:
            inner.append((below, dotted))
        shown = f"[`{name}`](#{dotted.replace('.', '')})" if below else f"`{name}`"
        meaning = field["description"] if "description" in field else below["description"]
        yield f"| {shown} | {_values(tree, field)} | {_default(node, name, field)} | {_cell(meaning)} |"
    yield ""
    for below, dotted in inner:
        yield from _sections(tree, below, dotted)


def _heading(node: dict[str, Any], key: str) -> Iterator[str]:
    if key:
        yield f"{'#' * min(4, 2 + key.count('.'))} `{key}`\n"
        yield f"{_cell(node['description'])}\n"
    else:
        yield "## The whole file\n"


def _node(tree: dict[str, Any], field: dict[str, Any]) -> dict[str, Any] | None:
    """The node that a field holds, or holds a list of."""
    parts = (field, *field.get("anyOf", ()), field.get("additionalProperties", {}))
    for part in (*parts, *(part.get("items", {}) for part in parts if isinstance(part, dict))):
        name = (part if isinstance(part, dict) else {}).get("$ref", "").rpartition("/")[2]
        if name and "properties" in tree["$defs"][name]:
            return tree["$defs"][name]
    return None


def _values(tree: dict[str, Any], field: dict[str, Any]) -> str:
    """What may be written, in words."""
    if "anyOf" in field:
        return " or ".join(_values(tree, part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "keys of its own" if _node(tree, field) else _values(tree, tree["$defs"][field["$ref"].split("/")[-1]])
    kind = field.get("type", "any")
    if kind == "array":
        return _list(tree, field)
    limits = ", ".join(words.format(field[name]) for name, words in LIMITS.items() if name in field)
    return {"null": "null", "object": "a mapping"}.get(kind, kind) + (f" {limits}" if limits else "")


def _list(tree: dict[str, Any], field: dict[str, Any]) -> str:
    if "prefixItems" in field:
        return f"[{', '.join(_values(tree, part) for part in field['prefixItems'])}]"
    return f"list of {_values(tree, field['items'])}"


def _default(node: dict[str, Any], name: str, field: dict[str, Any]) -> str:
    if name in node.get("required", ()):
        return "**required**"
    default = field.get("default")
    return "" if isinstance(default, dict) and default else f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

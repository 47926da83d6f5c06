"""JSON Schema of sweep files, for editors: their own keys, and those of experiments where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trainer.experiment.explain import schema
from trainer.sweep.settings import TAKEN
from trainer.sweep.sweep_file import Sweep

DEFINITIONS = "#/$defs/"


def sweep_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of sweep files."""
    found, experiment = schema(Sweep), schema()
    defs = found["$defs"] = found["$defs"] | experiment["$defs"] | {"Experiment": {
        key: experiment[key] for key in ("type", "properties", "required", "additionalProperties")}}
    keys = {key: (place, value) for key, place, value in _keys("Experiment", defs) if key not in TAKEN}
    properties, search = found["properties"], defs["Search"]["properties"]
    properties["grid"] |= _mapping({key: _several(*known) for key, known in keys.items()})
    search["space"] |= _mapping({key: {"anyOf": [_several(*known), {"$ref": f"{DEFINITIONS}Parameter"}]}
                                       for key, known in keys.items()})
    defs["Key"] = _names(keys)
    defs["Overrides"] = _mapping({key: _part(*known) for key, known in keys.items()})
    properties["overrides"] = {"description": properties["overrides"]["description"],
                               "$ref": f"{DEFINITIONS}Overrides"}
    properties["list"]["items"] = {"$ref": f"{DEFINITIONS}Overrides"}
    return found


def _keys(node: str, defs: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Dotted key, place in the schema and schema of everything that an experiment may say."""
    for name, value in defs[node]["properties"].items():
        yield f"{above}{name}", f"{DEFINITIONS}{node}/properties/{name}", value
        for inner in _nodes(value):
            yield from _keys(inner, defs, f"{above}{name}.")


def _nodes(value: dict[str, Any]) -> list[str]:
    """Names of the nodes that a value may be."""
    return [choice["$ref"].removeprefix(DEFINITIONS) for choice in value.get("anyOf", [value]) if "$ref" in choice]


def _several(place: str, value: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of values for a key."""
    return {"type": "array", "minItems": 1, "items": {"$ref": place}, "description": value.get("description", "")}


def _part(place: str, value: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that may be a mapping with some of a node's keys only."""
    if _nodes(value):
        return {"type": ["object", "null"], "description": value.get("description", "")}
    return {"$ref": place}


def _mapping(properties: dict[str, Any]) -> dict[str, Any]:
    """A mapping by key of the experiment."""
    return {"type": "object", "properties": properties, "additionalProperties": True,
            "propertyNames": {"$ref": f"{DEFINITIONS}Key"}}


def _names(keys: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The schema of a key; within mappings of anything, such as `architecture`, any key may follow."""
    free = [re.escape(key) for key, (_, value) in keys.items()
            if any(choice.get("additionalProperties") for choice in value.get("anyOf", [value]))]
    return {"anyOf": [{"enum": list(keys)}, {"pattern": f"^({'|'.join(free)})\\."}]}

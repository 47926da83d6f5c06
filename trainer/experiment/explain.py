"""Views of an experiment: the help text of all keys, the JSON Schema for editors, the resolved YAML."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from trainer.experiment.experiment import Experiment
from trainer.experiment.load import Source, all_keys, node_of
from trainer.experiment.node import Node


def help_text(root: type[Node] = Experiment) -> str:
    """Help text for `--help`: every key of a file with its one-line meaning and its default."""
    lines = ["Keys of the file, with their defaults:", ""]
    for key, info in all_keys(root).items():
        depth, name = key.count("."), key.rsplit(".", 1)[-1]
        head = "  " * (depth + 1) + name + (":" if node_of(info.annotation) else f": {_default(info)}")
        lines.append(f"{head:<42} {info.description}")
    return "\n".join(lines)


def _default(info: Any) -> str:
    if info.default is PydanticUndefined:
        return "(required)"
    default = list(info.default) if isinstance(info.default, tuple) else info.default
    return json.dumps(default)


def schema(root: type[Node] = Experiment) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of experiment files, for completion and validation in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root.model_json_schema()}


def resolved_yaml(experiment: Experiment) -> str:
    """The whole experiment, defaults included, as YAML that reads back to the same experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def resolved_table(source: Source) -> list[tuple[str, str, str]]:
    """Rows (key, value, origin) for every value, defaults included; the origin is where the value was set."""
    rows = []
    for key, info in all_keys(Experiment).items():
        value: Any = source.experiment
        for part in key.split("."):
            value = getattr(value, part, None)
        if node_of(info.annotation) and value is not None:
            continue
        if value is None and any(_get(source.experiment, above) is None for above in _above(key)):
            continue  # the whole node is absent, and has a row of its own
        rows.append((key, json.dumps(_plain(value)), source.origins.get(tuple(key.split(".")), "default")))
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON has it; of the nodes in a list, what was given."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Node) else value


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _get(experiment: Experiment, key: str) -> Any:
    value: Any = experiment
    for part in key.split("."):
        value = getattr(value, part, None)
    return value

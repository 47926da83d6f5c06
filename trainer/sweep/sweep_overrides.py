"""Overrides of a sweep: `key=value` after the sweep file, for its own keys and for those of all its runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from trainer.experiment.experiment import Experiment
from trainer.experiment.load import place_of, read_override
from trainer.experiment.plain_yaml import Key

BY_KEY = ("overrides", "grid", "search.space")  # mappings by key of the experiment, which is written with dots


def apply_overrides(overrides: Sequence[str], values: dict[str, Any], origins: dict[Key, str], own: Collection[str]
                    ) -> None:
    """Apply overrides to the values of a sweep file, in place.

    Args:
        overrides: `key=value` strings. What is no key of a sweep is one of the experiment, for all runs.
        values: as read from the file.
        origins: key as a tuple of names, dotted ones taken apart -> `file:line`; gets the overrides.
        own: the keys of a sweep.

    Raises:
        ExperimentErrors: one is not `key=value`.
    """
    for override in overrides:
        name, value = read_override(override, place_of(override), "jobs=2, or training.steps=200 for all runs")
        first = name.partition(".")[0]
        if first not in own and (first in Experiment.model_fields or not get_close_matches(first, own)):
            name = f"overrides.{name}"
        above = next((key for key in BY_KEY if name.startswith(f"{key}.")), None)
        place, key = (above, name.removeprefix(f"{above}.")) if above else name.rpartition(".")[::2]
        node = values
        for part in place.split(".") if place else ():
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        if place == "overrides":  # {a: {b: 1}} there is a.b: 1, and may be overridden in part
            _replace(node, key, value)
        else:
            node[key] = value
        whole = tuple(name.split("."))
        for older in [known for known in origins if known[:len(whole)] == whole]:
            del origins[older]
        origins[whole] = place_of(override)


def _replace(node: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key among others, with what is beneath it."""
    kept = {other: one for other, one in leaves(node)
            if other != key and not other.startswith(f"{key}.") and not key.startswith(f"{other}.")}
    node.clear()
    node.update(kept | {key: value})


def leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a mapping: `{a: {b: 1}}` and `{a.b: 1}` say the same."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value

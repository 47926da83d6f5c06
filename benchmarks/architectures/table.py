"""Rows as Markdown: what works where."""

from __future__ import annotations

from collections import Counter
from typing import Any

CHECKS = ("causal", "loss", "packing", "memory", "layers", "quantized", "onnx", "gguf", "ddp", "fsdp2", "zero")
SHOWN = {"right": "yes", "refused": "refused", "wrong": "**wrong**", "traceback": "**fails**"}
LONGEST = 220  # characters of a message


def table(found: dict[str, Any]) -> str:
    """A line for each type, a column for each check; then how many are what, and what the messages say."""
    rows = [row for row in found["rows"] if "not_built" not in row]
    lines = [f"| type | {' | '.join(CHECKS)} |", "|---|" + "---|" * len(CHECKS)]
    lines += [f"| {row['type']} | " + " | ".join(_cell(row["checks"].get(name)) for name in CHECKS) + " |"
              for row in rows]
    lines += ["", _counts(rows), *_absent(found["rows"]), *_messages(rows)]
    return "\n".join(lines)


def _cell(one: dict[str, Any] | None) -> str:
    return "" if one is None else SHOWN[one["verdict"]]


def _counts(rows: list[dict[str, Any]]) -> str:
    every = Counter(one["verdict"] for row in rows for one in row["checks"].values())
    said = ", ".join(f"{every[name]} {word}" for name, word in (
        ("right", "right"), ("refused", "refused before training, with a message"), ("wrong", "wrong"),
        ("traceback", "ended by an error that is no message")))
    return f"Of {sum(every.values())} checks of {len(rows)} types: {said}."


def _absent(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {row['type']}: {_short(row['not_built'])}" for row in rows if "not_built" in row]
    return ["", "Not examined, since no tiny model of it runs by itself:", "", *lines] if lines else []


def _messages(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong, each on a line; then each kind of refusal with how many types it is for."""
    lines: list[str] = []
    bad = [(row["type"], name, one) for row in rows for name, one in row["checks"].items()
           if one["verdict"] in ("wrong", "traceback")]
    if bad:
        lines += ["", "What is wrong yet:", "", *(f"- {kind}, {name}: {_figures(one)}" for kind, name, one in bad)]
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, one in row["checks"].items():
            if one["verdict"] == "refused":
                kinds.setdefault((name, _kind(one["said"], row)), []).append(row["type"])
    if kinds:
        lines += ["", "What refusals say:", ""]
        lines += [f"- {name}, {len(every)} types, for example {every[0]}: {_short(said)}"
                  for (name, said), every in sorted(kinds.items(), key=lambda one: (CHECKS.index(one[0][0]),
                                                                                    -len(one[1])))]
    return lines


def _kind(said: str, row: dict[str, Any]) -> str:
    """A message without the names of its own model."""
    return said.replace(row.get("class", row["type"]), "...").replace(f"{row['type']} ", "... ")


def _figures(one: dict[str, Any]) -> str:
    if "said" in one:
        return _short(one["said"])
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in one.items() if name != "verdict")


def _short(said: str) -> str:
    plain = " ".join(said.split()).replace("|", "/").replace("<", "(").replace(">", ")").replace("*", "\\*")
    return plain if len(plain) <= LONGEST else plain[:LONGEST] + "..."

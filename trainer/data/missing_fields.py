"""The error for records without the field that the experiment names, with what they seem to be instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError

PREFERENCES = ("chosen", "rejected")


def no_such_field(key: str, name: str, record: Mapping[str, Any], place: str = "") -> UserError:
    """The error for a field that records lack.

    Args:
        key: key of `data` that names the field.
        name: name of the field.
        record: one of the records.
        place: where it is, for the message.
    """
    if all(one in record for one in PREFERENCES):
        return UserError(f"data.{key}", "these are preference pairs (chosen, rejected), and there is no loss on pairs "
                         "of answers", value=name, way_out=_chosen_alone(record))
    names = [str(one)[:40] for one in record][:20]
    near = difflib.get_close_matches(name, names, 1)
    way_out = (f"did you mean {near[0]!r}? " if near else "") + f"their fields are {', '.join(names)}"
    if len(names) == 1 and (other := next((mark for mark in (";", "\t", "|") if mark in names[0]), None)):
        way_out += f"; they seem to be separated by {other!r}: write commas, or tabs in a file that ends with .tsv"
    elif ".csv" in place or ".tsv" in place:
        way_out += "; the first line of such a file names them"
    where = f", {place} for one" if place else ""
    return UserError(f"data.{key}", f"the records have no such field{where}", value=name, way_out=way_out)


def _chosen_alone(record: Mapping[str, Any]) -> str:
    """How to fine-tune on the chosen answers of a preference pair."""
    chosen, prompt = record["chosen"], record.get("prompt")
    found = chosen if isinstance(chosen, list) else []
    first = found[0].get("role") if found and isinstance(found[0], dict) else None
    if found and prompt is not None and first == "assistant":
        return "join prompt and chosen to one list of messages in each record, and name it in `data.messages`"
    if found or isinstance(chosen, str) and chosen.lstrip().startswith("["):
        return "fine-tune on the chosen answers alone, with data.messages: chosen"
    if prompt is not None:
        return "fine-tune on the chosen answers alone, with data.prompt: prompt and data.response: chosen"
    return "fine-tune on the chosen answers alone, with data.text: chosen"

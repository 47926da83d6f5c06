"""Normalize the conversation of a record to what chat templates expect.

Roles and keys get their standard names, nulls that only a table's columns introduced are dropped, contents are text or
lists of text parts, and tools are JSON schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]  # messages, and the tools they may call

# Names used by other formats. Suggested in errors for records that cannot be read; never applied automatically.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "ai": "assistant", "function_call": "assistant", "observation": "tool"}
KEYS = {"role": ("role", "from", "speaker", "author"), "content": ("content", "value", "text", "message")}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", *THOUGHTS, "function_call")  # keys that make a message valid without content


def read_conversation(record: dict[str, Any], data: Data, as_written: bool = False) -> Conversation:
    """Read the messages and tools of a record.

    Args:
        record: a record with the fields that `data` names.
        as_written: whether its nulls were written by the author of the data. In a table, a record has a null wherever
            it lacks a key that another record has, so that nulls are dropped there.

    Raises:
        UserError: the record is not a conversation; suggests the mapping that makes it one, if there is any.
    """
    tidy: Callable[[Any], Any] = (lambda value: value) if as_written else without_nulls
    found = tidy(_from_json(record.get(data.messages)))
    if not isinstance(found, list):
        raise UserError("data.messages", f"a record has {_kind(found)} in this field where a list of messages is "
                        f"expected: {shown(record)}", value=data.messages, way_out="mend or remove the record")
    messages = [_message(one, found, data) for one in found]
    return messages, None if data.tools is None else _tools(tidy(_from_json(record.get(data.tools))), record, data)


def without_nulls(value: Any) -> Any:
    """A copy without the keys whose value is null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def texts_of(record: dict[str, Any], data: Data) -> list[str]:
    """All text in a record's messages, as far as it can be read, to train a tokenizer on."""
    found = _from_json(record.get(data.messages))
    contents = [one.get(data.keys.get("content", "content")) for one in found if isinstance(one, dict)
                ] if isinstance(found, list) else []
    parts = [part.get("text") for one in contents if isinstance(one, list) for part in one if isinstance(part, dict)]
    return [text for text in [*contents, *parts] if isinstance(text, str)]


def notes_on_calls(records: Iterable[dict[str, Any]], data: Data) -> list[str]:
    """A note for the user if messages call tools but `data.tools` names no field, so that prompts list no tools."""
    if not data.messages or data.tools:
        return []
    found = (_from_json(record.get(data.messages)) for record in records)
    if not any(isinstance(one, dict) and one.get("tool_calls") for messages in found if isinstance(messages, list)
               for one in messages):
        return []
    return ["messages call tools, and data.tools names no field: what tools there are stands in no prompt"]


def thoughts_of(message: Message) -> str:
    """The reasoning text of an answer, from its own field or from a `<think>` block in the content; "" if none."""
    own = next((message[name] for name in THOUGHTS if isinstance(message.get(name), str)), None)
    content = message.get("content")
    if own is None and isinstance(content, str) and "</think>" in content:
        own = content.partition("</think>")[0].rpartition("<think>")[2]
    return (own or "").strip()


def shown(record: Any) -> str:
    """The beginning of a record, for error messages; after shuffling, a record number would not help to find it."""
    return json.dumps(record, default=str, ensure_ascii=False)[:200]


def _message(given: Any, every: list[Any], data: Data) -> Message:
    if not isinstance(given, dict):
        raise UserError("data.messages", f"a record holds a message that is {_kind(given)}: {shown(every)}",
                        value=data.messages, way_out="mend or remove the record: a message is {role, content}")
    theirs = {name: key for key, name in data.keys.items()}
    # A mapped field is not kept under its own name, nor is a field whose name it takes over.
    message = {theirs.get(name, name): value for name, value in given.items()
               if value is not None and (name in theirs or name not in data.keys)}
    role = message.get("role")
    if not isinstance(role, str) or "content" not in message and not any(message.get(name) for name in CALLS):
        raise _unread(given, every, data)
    if role in ROLES and role not in data.roles:
        raise UserError("data.roles", f"a message has role {role!r}, and only the role assistant is learned: "
                        f"{shown(every)}", way_out=f"add to data: {_roles(every, data)}")
    message["role"] = data.roles.get(role, role)
    if "content" in message:
        message["content"] = _content(message["content"], every, data)
    return message


def _unread(given: Message, every: list[Any], data: Data) -> UserError:
    """The error for a message without role or content; suggests a mapping if its keys are known ones."""
    found = {ours: next((name for name in names if isinstance(given.get(name), str)), None)
             for ours, names in KEYS.items()}
    other = {ours: name for ours, name in found.items() if name not in (None, ours)}
    if other and None not in found.values():
        keys = ", ".join(f"{ours}: {name}" for ours, name in other.items())
        every = [{**one, "role": one.get(found["role"])} for one in every if isinstance(one, dict)]
        roles = _roles(every, data)
        return UserError("data.keys", f"a record holds a message that is not {{role, content}}: {shown(given)}",
                         way_out=f"add to data: keys: {{{keys}}}" + (f", {roles}" if roles else ""))
    if isinstance(given.get(data.keys.get("role", "role")), str):
        return UserError("data.messages", f"a message has no content: {shown(every)}", value=data.messages,
                         way_out='remove the record, or write "" for one that says nothing; only beside tool_calls it '
                         "may be null")
    return UserError("data.messages", f"a record holds a message that is not {{role, content}}: {shown(given)}",
                     value=data.messages, way_out="mend or remove the record, or name its fields in data.keys, for "
                     "example keys: {role: from, content: value}")


def _roles(every: list[Any], data: Data) -> str:
    """A `roles: {...}` mapping for the roles of a conversation, for the user to paste; "" if none is needed."""
    seen = dict.fromkeys(one.get(data.keys.get("role", "role"), one.get("role")) for one in every
                         if isinstance(one, dict))
    mapped = {**data.roles, **{role: ROLES[role] for role in seen if role in ROLES}}
    return "roles: {" + ", ".join(f"{theirs}: {ours}" for theirs, ours in mapped.items()) + "}" if mapped else ""


def _content(content: Any, every: list[Any], data: Data) -> str | list[dict[str, str]]:
    """Check that the content of a message is text, or a list of text parts, and return it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError("data.messages", f"a message has {_kind(content)} as its content where text is expected: "
                        f"{shown(every)}", value=data.messages, way_out="mend or remove the record")
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or not str(kind).endswith("text"):
            raise UserError("data.messages", f"a message has a part of type {kind!r} in its content, and only text is "
                            f"learned: {shown(every)}", value=data.messages,
                            way_out="remove the record, or this part of it")
        parts.append({"type": "text", "text": text})
    return parts


def _tools(found: Any, record: dict[str, Any], data: Data) -> list[dict[str, Any]] | None:
    listed = [_from_json(one) for one in found] if isinstance(found, list) else [found] if found else []
    if not all(isinstance(one, dict) for one in listed):
        raise UserError("data.tools", f"a record has {_kind(found)} in this field where a list of JSON schemas is "
                        f"expected: {shown(record)}", value=data.tools, way_out="mend or remove the record")
    return listed or None


def _from_json(value: Any) -> Any:
    """Parse a value that is JSON text; any other value is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

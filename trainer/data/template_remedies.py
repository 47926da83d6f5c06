"""Find, by trial, changes that make a chat template accept a conversation it refuses, to suggest in the error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

from trainer.data.messages import THOUGHTS, Message

Messages = list[Message]
Tools = list[dict[str, Any]] | None
Change = Callable[[Messages], Messages | None]
PLAIN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOGETHER = 3  # largest number of changes to try together
COPY = "in a copy of the tokenizer's folder that data.tokenizer.path names"


def remedy(messages: Messages, tools: Tools, takes: Callable[[Messages, Tools], bool], some_tool: dict[str, Any]
           ) -> str:
    """Describe the fewest changes with which a template accepts a conversation.

    Args:
        messages: the conversation that the template refuses.
        tools: its tools.
        takes: whether the template accepts a conversation with these tools.
        some_tool: a tool to try, in case the template requires tools.
    """
    for count in range(1, TOGETHER + 1):
        for chosen in combinations(CHANGES, count):
            changed: Messages | None = messages
            for _, change in chosen:
                changed = change(changed) if changed is not None else None
            if changed and takes(changed, tools):
                return "; ".join(words for words, _ in chosen)
    if tools and takes(messages, None):
        return f"this template cannot write these tools: leave `data.tools` out, or mend the template {COPY}"
    if not tools and not takes(PLAIN, None) and takes(messages, [some_tool]):
        return "this template wants tools: name their field in `data.tools`, or name another `data.tokenizer.path`"
    if not any(message["role"] == "user" for message in messages):
        system = [message for message in messages[:1] if message["role"] == "system"]
        if any(takes([*kept, PLAIN[0], *messages[len(system):]], tools) for kept in (system, [])):
            return "this template wants a message of the user before the answer: remove records without one"
    return _by_part(messages, tools, takes, some_tool)


def system_to_user(messages: Messages) -> Messages | None:
    """Move the system message's text to the beginning of the first user message; None if either is missing."""
    at = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if messages[0]["role"] != "system" or at is None:
        return None
    joined = {**messages[at], "content": _joined(messages[0].get("content"), messages[at].get("content"))}
    return [*messages[1:at], joined, *messages[at + 1:]]


def _by_part(messages: Messages, tools: Tools, takes: Callable[[Messages, Tools], bool], some_tool: dict[str, Any]
             ) -> str:
    """Describe which kind of message the template refuses."""
    if not takes(PLAIN, tools):
        return f"it refuses a plain question and its answer as well: mend the template {COPY}, or name another one"
    spoken = [message for message in messages if message["role"] != "tool" and not message.get("tool_calls")]
    if len(spoken) < len(messages):
        words = "this template does not write these calls and their results: remove records that have them, name " \
                f"another `data.tokenizer.path`, or mend the template {COPY}"
        return words if not spoken or takes(spoken, tools) else f"{words}; {remedy(spoken, tools, takes, some_tool)}"
    return "mend or remove the record"


def _user_first(messages: Messages) -> Messages | None:
    """Drop the assistant's messages before the first user message; None if there are none."""
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    kept = [message for at, message in enumerate(messages) if at >= (first or 0) or message["role"] != "assistant"]
    return None if first is None or len(kept) == len(messages) else kept


def _no_system(messages: Messages) -> Messages | None:
    return messages[1:] if messages[0]["role"] == "system" and system_to_user(messages) is None else None


def _joined_rows(messages: Messages) -> Messages | None:
    """Join consecutive messages of the same role; None if there are none."""
    joined: Messages = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"] != "tool":
            joined[-1] = {**joined[-1], "content": _joined(joined[-1].get("content"), message.get("content"))}
        else:
            joined.append(message)
    return joined if len(joined) < len(messages) else None


def _one_call_each(messages: Messages) -> Messages | None:
    """Put every call into its own message, followed by its result, matched by order; None if nothing changes."""
    changed: Messages = []
    results = [message for message in messages if message["role"] == "tool"]
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and len(calls) > 1:
            for call in calls:
                changed += [{**message, "tool_calls": [call]}, *results[:1]]
                results = results[1:]
        elif message["role"] != "tool" or any(message is one for one in results[:1]):
            changed.append(message)
            results = results[1:] if message["role"] == "tool" else results
    return changed if any(len(message.get("tool_calls") or []) > 1 for message in messages) else None


def _no_thoughts(messages: Messages) -> Messages | None:
    """Drop the reasoning of messages that have both calls and content; None if there are none."""
    kept = [{key: value for key, value in message.items() if not (message.get("tool_calls") and message.get("content")
             and key in THOUGHTS)} for message in messages]
    return kept if kept != messages else None


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    return [part for content in (first, second) if content is not None for part in (
        [{"type": "text", "text": content}] if isinstance(content, str) else content)]


CHANGES: list[tuple[str, Change]] = [
    ("this template takes no system message: put its text at the beginning of the first user message", system_to_user),
    ("this template takes no system message here: remove it", _no_system),
    ("this template wants the user to begin: remove the assistant's message before", _user_first),
    ("this template wants user and assistant to take turns: join messages of one role that stand in a row",
     _joined_rows),
    ("this template takes one call in a message: give each a message of its own, before its result", _one_call_each),
    ("this template takes content or thoughts in a message that calls, not both: remove one of them", _no_thoughts),
]

"""Probe a chat template with small conversations: which formats it accepts, and how it opens and closes a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from os.path import commonprefix
from typing import Any

from trainer.data.messages import Message

USER, ANSWER = {"role": "user", "content": "Jqwvx"}, "Zkqwv"
WORD, PLACE = "Xjqzw", "Vqjzx"
TOOL = {"type": "function", "function": {"name": WORD, "description": WORD, "parameters": {
    "type": "object", "properties": {"place": {"type": "string", "description": "a place"}}}}}


class TemplateShape:
    """Properties of a template, found by rendering probe conversations.

    Args:
        write: renders messages, given also the tools and whether to add a generation prompt; returns None if the
            template refuses them.
    """

    def __init__(self, write: Callable[..., str | None]):
        self._write = write
        self._fields: dict[str, bool] = {}

    def fit(self, messages: list[Message]) -> list[Message]:
        """Convert the contents and call arguments of messages to the types that the template accepts."""
        return [self._fitted(message) for message in messages]

    def notes(self, marked: Callable[[list[Message]], tuple[str, str]] | None) -> list[str]:
        """Remarks for the user; `marked`, if given, returns a text and the part that the template itself marks."""
        if marked is not None:
            return self._notes_of_marks(marked(self._answer)[1]) if self._answered is not None else []
        if self._asked and self._answered and not self._answered.startswith(self._asked):
            return [f"the chat template's prompt ends with {self.header!r}, and answers are written without it where "
                    "they have none of their own: they are learned as they are written"]
        return []

    def _notes_of_marks(self, loss_mask: str) -> list[str]:
        """Remarks on unusual {% generation %} marks, given the part of an answer that they cover."""
        notes, end, header = [], (self.closing or "").strip(), self.header.strip()
        if end and end not in loss_mask:
            notes.append(f"the chat template's {{% generation %}} marks leave out the end of a turn, {end!r}: the "
                         "student does not learn to end an answer")
        if header and loss_mask.lstrip().startswith(header):
            notes.append(f"the chat template's {{% generation %}} marks hold {header!r}, which a prompt ends with: it "
                         "is learned too")
        return notes

    @cached_property
    def header(self) -> str:
        """The text that a generation prompt adds; "" if the template adds none."""
        before = self._write(self.fit([USER]))
        if before is None or self._asked is None or not self._asked.startswith(before):
            return ""
        return self._asked[len(before):]

    @cached_property
    def closing(self) -> str | None:
        """The text after the content of a last answer, which closes the turn; None if unknown."""
        return None if self._answered is None or ANSWER not in self._answered else self._answered.rpartition(ANSWER)[2]

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes tools; true if it refuses the probe, so that the records decide."""
        given = self._write(self.fit([USER]), [TOOL])
        return given is None or WORD in given

    @cached_property
    def added_prompt(self) -> str:
        """The system prompt that the template adds to a conversation without one; "" if it adds none.

        Of a template that joins it with a given one, all that it writes before the first message of a user only.
        """
        return self._default_system or (self._opening if re.search(r"\w+ \w+", self._opening) else "")

    @cached_property
    def _opening(self) -> str:
        """The text before the first message of a user that is not there before a later one."""
        alone = self._write(self.fit([USER]))
        later = self._write(self.fit([{**USER, "content": WORD}, {"role": "assistant", "content": ANSWER}, USER]))
        if alone is None or later is None:
            return ""
        head, other = alone.partition(USER["content"])[0], later.rpartition(USER["content"])[0]
        return head[:len(head) - len(commonprefix([head[::-1], other[::-1]]))].strip()

    @cached_property
    def _default_system(self) -> str:
        given, alone = self._with_system, self._write(self.fit([USER]))
        if given is None or alone is None or given.count(WORD) != 1:
            return ""
        before, _, after = given.partition(WORD)
        adds = alone.startswith(before) and alone.endswith(after) and len(alone) > len(before) + len(after)
        return alone[len(before):len(alone) - len(after)].strip() if adds else ""

    @cached_property
    def writes_system(self) -> bool:
        """Whether the template writes a system message."""
        return self._with_system is not None and WORD in self._with_system

    @cached_property
    def can_be_silenced(self) -> bool:
        """Whether an empty system message takes the place of the system prompt that the template adds."""
        silent = self._write(self.fit([{"role": "system", "content": ""}, USER]))
        return silent is not None and self.added_prompt not in silent

    def writes(self, key: str) -> bool:
        """Whether the template writes a field of the assistant's message other than its content.

        True if it refuses every probe, so that the records decide.
        """
        if key not in self._fields:
            self._fields[key] = self._tried(key)
        return self._fields[key]

    def _tried(self, key: str) -> bool:
        def call(name: str) -> Message:
            return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": {"place": PLACE}}}

        value: Any = {"tool_calls": [call(WORD)], "function_call": call(WORD)["function"]}.get(key, WORD)
        tool = {**TOOL, "function": {**TOOL["function"], "name": PLACE, "description": PLACE}}
        # Some templates write reasoning only together with a call.
        answers = [{"content": ANSWER}, {"content": ""}, {"content": "", "tool_calls": [call(PLACE)]}]
        # Others write it only after a first answer.
        found = [self._write(self.fit([*before, USER, {"role": "assistant", **answer, key: value}]), tools)
                 for before in ([], self._answer) for answer in answers for tools in (None, [tool])]
        return all(text is None for text in found) or any(WORD in text for text in found if text is not None)

    @cached_property
    def always_prompts(self) -> bool:
        """Whether the template ends every conversation with a generation prompt, even if none is requested."""
        before, text, closing = self._write(self.fit([USER])), self._answered, self.closing
        if not before or before != self._asked or not closing or not text.startswith(before):
            return False
        followed = self._write(self.fit([*self._answer, USER]))
        return followed is not None and ANSWER in followed and not followed.rpartition(ANSWER)[2].startswith(closing)

    # ---- probes

    @cached_property
    def _with_system(self) -> str | None:
        return self._write(self.fit([{"role": "system", "content": WORD}, USER]))

    @cached_property
    def _answer(self) -> list[Message]:
        return self.fit([USER, {"role": "assistant", "content": ANSWER}])

    @cached_property
    def _answered(self) -> str | None:
        return self._write(self._answer)

    @cached_property
    def _asked(self) -> str | None:
        return self._write(self.fit([USER]), prompt=True)

    @cached_property
    def _contents(self) -> str:
        """The content type that the template accepts: "text" (strings), "parts" (lists of text parts), or "both"."""
        text, parts = (self._write([{"role": "user", "content": content}])
                       for content in (WORD, [{"type": "text", "text": WORD}]))
        if text is not None and text == parts:
            return "both"
        return "parts" if parts is not None and WORD in parts and (text is None or WORD not in text) else "text"

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether call arguments have to be JSON text, since the template refuses objects or prints their `repr`."""
        def called(arguments: Any) -> str | None:
            call = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": arguments}}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self._write([*self.fit_contents([USER]), *self.fit_contents([answer])], [TOOL])
        given = called({"place": PLACE})
        # A template that writes calls as Python (`look(place='x')`) needs an object.
        return (given is None or str({"place": PLACE}) in given) and called(json.dumps({"place": PLACE})) is not None

    def fit_contents(self, messages: list[Message]) -> list[Message]:
        """Convert the contents of messages to the type that the template accepts."""
        return [{**message, "content": self._content(message["content"])} if "content" in message else message
                for message in messages]

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._contents == "parts" else content
        return content if self._contents != "text" else "".join(part["text"] for part in content)

    def _fitted(self, message: Message) -> Message:
        message = self.fit_contents([message])[0]
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            return message
        return {**message, "tool_calls": [self._call(call) for call in calls]}

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        own = function if isinstance(function, dict) else call
        if not isinstance(own, dict) or "arguments" not in own:
            return call
        changed = {**own, "arguments": self._argument(own["arguments"])}
        return changed if own is call else {**call, "function": changed}

    def _argument(self, arguments: Any) -> Any:
        if self._arguments_as_text:
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            return arguments
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments

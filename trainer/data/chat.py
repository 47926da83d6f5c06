"""Render conversations with a chat template, and find the characters of the assistant's turns for the loss mask.

If the template marks them itself ({% generation %}), its marks decide. Otherwise a turn is what the template writes
between the inference prompt (the messages before it, plus the generation prompt) and the end of the turn, including the
end marker. Some templates render a turn differently once others follow, for example with reasoning only in the last
turn. A conversation then becomes several samples, so that each turn is learned in the context it has at inference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.data.messages import CALLS, THOUGHTS, Conversation, Message, shown
from trainer.data.template_remedies import COPY, remedy, system_to_user
from trainer.data.template_traits import TOOL, USER, TemplateShape
from trainer.errors import UserError

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None
# Templates are third-party programs, and can raise any of these.
FAILURES = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
            MemoryError)
MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
SENTINELS = "Qvxqj", "Wkzpf"  # two answers whose first characters differ, and whose last characters differ
MARKING = f"mark what the assistant says in the template with {{% generation %}} and {{% endgeneration %}}, {COPY}"


@dataclass(frozen=True)
class Sample:
    """A rendered conversation, or its beginning, with the parts that the loss covers.

    Attributes:
        text: the text that the template writes.
        spans: character ranges that the loss covers; a token is a target if it begins inside one.
        marks: (n,) 1 for each token of the text that is a target, if the template has its own marks; else None.
        is_open: the assistant's turn is last and nothing closes it, so that an end-of-sequence token has to be added.
    """

    text: str
    spans: list[Span]
    marks: list[int] | None = None
    is_open: bool = False


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn: its beginning in `text`, which is the conversation up to and including it."""

    begin: int
    text: str


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, and finds what the loss covers.

    Args:
        tokenizer: a tokenizer with a chat template.
        key: key of the experiment that error messages refer to, for example `data.messages`.
        value: value of that key.
        tools: whether conversations have tools.
        system: the system prompt of conversations without one; "" or false for none, None for the template's own.

    Raises:
        UserError: there is no template, it does not write tools or a system prompt, or it begins an answer after every
            conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str, value: Any, tools: bool = False,
                 system: str | bool | None = None):
        self.tokenizer, self.key, self.value, self.system = tokenizer, key, value, system
        if not tokenizer.chat_template:
            raise UserError(key, "this tokenizer has no chat template to write messages with", value=value,
                            way_out="name another `data.tokenizer.path`, or use `data.prompt` and `data.response`, "
                            "which need none")
        self.shape = TemplateShape(self._attempt)
        if tools and not self.shape.writes_tools:
            raise UserError("data.tools", "this tokenizer's chat template does not write tools",
                            way_out="name another `data.tokenizer.path`, or leave out `data.tools` and records with "
                            "calls")
        if self.shape.always_prompts and not self._marked(None):
            raise UserError(key, "the chat template begins another answer at the end of every conversation, which "
                            "would be learned", value=value,
                            way_out=f"write that in {{% if add_generation_prompt %}} alone, {COPY}")
        self._check_system()

    def samples(self, conversation: Conversation) -> list[Sample]:
        """Samples of a conversation: one, or several with a common beginning.

        Raises:
            UserError: the template refuses the conversation, or changes an answer so that it cannot be located.
        """
        messages, tools = conversation
        if not messages:
            return []
        self._check_fields(messages)
        messages = self.shape.fit(self.with_system(messages))
        text = self._attempt(messages, tools)
        if text is None and any("content" not in message for message in messages):
            messages = self._said_nothing(messages)
        text = self._write(messages, tools)
        if self._marked(tools):
            return [Sample(text, [], self._marks(messages, tools), self._is_open(text, messages))]
        turns = {at: self._turn(messages, at, tools) for at, message in enumerate(messages)
                 if message["role"] == "assistant"}
        samples, left, upto = [], dict(turns), len(messages)
        while True:
            found = {at: span for at, turn in left.items()
                     if (span := self._span(text, messages[:upto], at, turn, tools)) is not None}
            if found or not turns:
                samples.append(Sample(text, sorted(found.values()), None, self._is_open(text, messages[:upto])))
            left = {at: turn for at, turn in left.items() if at not in found}
            if not left:
                return samples[::-1]
            last = max(left)
            if upto == last + 1 or left[last] is None:
                raise self._not_found(messages)
            text, upto = left[last].text, last + 1

    def prompt(self, conversation: Conversation) -> str:
        """The text that a server gives a model to answer: the conversation, and what an answer begins with.

        Raises:
            UserError: the template refuses the conversation.
        """
        messages, tools = self.shape.fit(self.with_system(conversation[0])), conversation[1]
        text = self._attempt(messages, tools, prompt=True)
        return self._write(messages, tools) + self.shape.header if text is None else text

    @property
    def end(self) -> int | None:
        """The token that closes an answer; None if it is unknown, or several tokens do."""
        closing = self.tokenizer.encode((self.shape.closing or "").strip(), add_special_tokens=False)
        return closing[0] if len(closing) == 1 and closing[0] in self.tokenizer.added_tokens_decoder else None

    def _check_system(self) -> None:
        if self.system and not self.shape.writes_system:
            raise UserError("data.system", "this tokenizer's chat template writes no system prompt", value=self.system,
                            way_out="put it at the beginning of the prompts in the data, and leave `data.system` out")
        if self.system in (False, "") and self.shape.added_prompt and not self.shape.can_be_silenced:
            raise UserError("data.system", "the chat template adds its system prompt whatever it is given: "
                            f"{self.shape.added_prompt[:100]!r}", value=self.system,
                            way_out=f"take it out of the template, {COPY}")

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages with the system prompt that was asked for, unless they begin with their own."""
        if self.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        if not self.system and not self.shape.added_prompt:
            return messages
        return [{"role": "system", "content": self.system or ""}, *messages]

    def _check_fields(self, messages: list[Message]) -> None:
        """Raise `UserError` if the template would drop a tool call or reasoning, and only the rest would be learned."""
        for message in messages:
            said = [key for key in (CALLS if message["role"] == "assistant" else ()) if message.get(key)]
            calls, thoughts = ([key for key in said if (key in THOUGHTS) is is_thought] for is_thought in (False, True))
            for keys, what in ((calls, "call"), (thoughts, "thought")):
                if keys and not any(self.shape.writes(key) for key in keys):
                    raise UserError(self.key, f"a message has {keys[0]}, which this tokenizer's chat template does not "
                                    f"write, so that it would be learned without its {what}: {shown(messages)}",
                                    value=self.value, way_out=self._instead(keys[0], what))

    def _instead(self, key: str, what: str) -> str:
        """Suggest what to do about a field that the template does not write."""
        known = [other for other in (THOUGHTS if what == "thought" else CALLS[:1]) if self.shape.writes(other)]
        if what == "thought" and known:
            return f"add to data: keys: {{{known[0]}: {key}}}"
        if what == "thought":
            return "put the thought into `content`, or leave it out: add to data: keys: " + f"{{unused: {key}}}"
        return "name another `data.tokenizer.path`, or " + (
            f"write calls as {known[0]}" if known else "remove records with calls")

    @cached_property
    def notes(self) -> list[str]:
        """Remarks for the user on the template."""
        return [*self._notes_on_system(), *self._notes_on_clock(),
                *self.shape.notes(None if not self._marked(None) else self._marked_text)]

    def _notes_on_system(self) -> list[str]:
        own, again = self.shape.added_prompt, "; give the same to a server"
        if self.system:
            return [f"conversations without a system prompt get data.system{again}"]
        if not own:
            return []
        if self.system is None:
            ours = "sets or drops it" if self.shape.can_be_silenced else "is written beside it"
            return [f"to a conversation without one, the chat template adds the system prompt {own[:100]!r}; "
                    f"data.system {ours}"]
        return [f"in the place of the chat template's own system prompt stands an empty one{again}"]

    def _notes_on_clock(self) -> list[str]:
        """A remark on a template that writes the date: the same data then has other tokens on another day."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str) or "strftime_now" not in template:
            return []
        fixed = "{%- macro strftime_now(format) -%}on no day{%- endmacro -%}" + template
        try:
            texts = {self.tokenizer.apply_chat_template([USER], tokenize=False, chat_template=one)
                     for one in (template, fixed)}
        except Exception:  # templates refuse in many ways what they do not like, and are tried on real records later
            return []
        return ["the chat template writes the date of its use into conversations: tokenized on another day, the same "
                "data has other tokens, also when a run resumes without its cache; to fix it, write a date in the "
                f"place of strftime_now, {COPY}"] if len(texts) > 1 else []

    # ---- turns

    def _turn(self, messages: list[Message], at: int, tools: Tools) -> _Turn | None:
        """The turn of message `at`; None if the template refuses a conversation that ends with it."""
        text = self._attempt(messages[:at + 1], tools)
        prompt = self._attempt(messages[:at], tools, prompt=True) if at else None
        if text is None:
            return None
        if prompt is not None and text.startswith(prompt):
            return _Turn(self._after_header(text, prompt, messages[:at + 1], tools), text)
        if prompt is not None and messages[at - 1]["role"] != "assistant":
            self._check_prompt(messages, at, prompt, text, tools)
        begin = self._begin(text, messages[:at + 1], at, tools)
        if begin is None and prompt is not None:
            begin = self._parting(text, prompt, messages[:at + 1], tools)
        if begin is None:
            raise self._not_found(messages)
        return _Turn(begin, text)

    def _after_header(self, text: str, prompt: str, messages: list[Message], tools: Tools) -> int:
        """Where the assistant's text begins after a prompt: behind the assistant header, if the prompt lacks it.

        After an answer, some templates write no generation prompt, although a second answer in a row does begin with
        the header.
        """
        at = len(messages) - 1
        if messages[at - 1]["role"] != "assistant" or not self.shape.header or \
                self._attempt(messages[:at], tools) != prompt:
            return len(prompt)
        return max(len(prompt), self._begin(text, messages, at, tools) or 0)

    def _check_prompt(self, messages: list[Message], at: int, prompt: str, text: str, tools: Tools) -> None:
        """Raise `UserError` if the template renders what precedes an answer differently once the answer is there."""
        if len(commonprefix([prompt, text])) >= len(prompt) - len(self._header_of(messages[:at], prompt, tools)):
            return
        merged, way_out = system_to_user(messages[:at + 1]), MARKING
        if merged is not None and (self._attempt(merged, tools) or "").startswith(
                self._attempt(merged[:-1], tools, prompt=True) or text):
            way_out = "put the text of the system message at the beginning of the first user message"
        raise UserError(self.key, "the chat template writes what stands before an answer otherwise once the "
                        f"answer is there, so that it would be learned after another prompt than a server's: "
                        f"{shown(messages)}", value=self.value, way_out=way_out)

    def _header_of(self, messages: list[Message], prompt: str, tools: Tools) -> str:
        """The text that the generation prompt adds to these messages."""
        before = self._attempt(messages, tools) or ""
        return prompt[len(before):] if prompt.startswith(before) else self.shape.header

    def _parting(self, text: str, prompt: str, messages: list[Message], tools: Tools) -> int | None:
        """Where the tokens of a text and of a prompt diverge within the prompt's header.

        This happens if the header holds an empty reasoning block, or opens one, and the answer begins differently.
        Returns None if they diverge before the header, or if the answer does not follow unchanged.
        """
        both = self.tokenizer([text, prompt], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        same = len(commonprefix(both["input_ids"]))
        begin = both["offset_mapping"][0][same][0] if same < len(both["input_ids"][0]) else len(text)
        if begin < len(prompt) - len(self._header_of(messages[:-1], prompt, tools)):
            return None
        return begin if all(one in text[begin:] for one in _said(messages[-1])) else None

    def _span(self, text: str, messages: list[Message], at: int, turn: _Turn | None, tools: Tools) -> Span | None:
        """The span of a turn in a text; None if it is rendered differently there than as the last turn."""
        if turn is not None:
            return (turn.begin, self._closed(text, turn.text)) if text.startswith(turn.text) else None
        begin = self._begin(text, messages, at, tools)
        other = self._replaced(messages, at, tools)
        if begin is None or other is None:
            raise self._not_found(messages)
        # The text after the answer is the same for other answers; the turn ends with the part that closes any turn.
        end = max(begin, len(text) - len(commonprefix([text[::-1], other[0][::-1]])))
        return begin, end + len(commonprefix([text[end:], self.shape.closing or ""]))

    def _closed(self, text: str, turn: str) -> int:
        """Where a turn ends in a text, including an end marker that the template writes only if something follows."""
        rest = text[len(turn):].lstrip()
        if self._closes or not rest.startswith(self.tokenizer.eos_token) or turn.rstrip().endswith(self._added):
            return len(turn)
        return len(text) - len(rest) + len(self.tokenizer.eos_token)

    def _begin(self, text: str, messages: list[Message], at: int, tools: Tools) -> int | None:
        """Where the assistant's text begins: up to there, the rendered text does not depend on its message."""
        others = self._replaced(messages, at, tools)
        if others is None:
            return None
        header = commonprefix(others)
        opening, common = self.shape.header, len(commonprefix([text, header]))
        if at == 0 and opening:  # nothing precedes it: look for the header that a prompt would end with
            place = text.rfind(opening, 0, len(header) + len(opening))
            if 0 <= place <= common:
                return place + len(opening)
        if common == len(header):
            return common
        opened = header.rfind(opening) + len(opening) if opening and opening in header else None
        before = self._attempt(messages[:at], tools) if at else ""
        if opened is None or before is None:
            return None
        return opened if len(commonprefix([text, before])) <= opened <= common else None

    def _replaced(self, messages: list[Message], at: int, tools: Tools) -> list[str] | None:
        """The conversation rendered with each of two sentinels as the answer; its calls stay if results need them."""
        for kept in ({"role": "assistant"}, messages[at]):
            texts = [self._attempt([*messages[:at], self.shape.fit([{**kept, "content": sentinel}])[0],
                                    *messages[at + 1:]], tools) for sentinel in SENTINELS]
            if None not in texts and all(sentinel in text for sentinel, text in zip(SENTINELS, texts, strict=True)):
                return texts
        return None

    def _is_open(self, text: str, messages: list[Message]) -> bool:
        """Whether the text ends with an answer that neither a special token of the template nor the EOS closes."""
        if messages[-1]["role"] != "assistant":
            return False
        written = text.rstrip()
        return not (written.endswith(self.tokenizer.eos_token) or self._closes and written.endswith(self._added))

    @cached_property
    def _added(self) -> tuple[str, ...]:
        """Added tokens such as special tokens; cached, since the tokenizer builds up to thousands on every access."""
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip())

    @cached_property
    def _closes(self) -> bool:
        """Whether the template closes a turn with an added token; true if its closing is unknown."""
        return self.shape.closing is None or any(token in self.shape.closing for token in self._added)

    def _not_found(self, messages: list[Message]) -> UserError:
        return UserError(self.key, "the chat template rewrites what the assistant says, so that it cannot be said "
                         f"which tokens are its own: {shown(messages)}", value=self.value, way_out=MARKING)

    # ---- the template

    def _marked(self, tools: Tools) -> bool:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = self.tokenizer.get_chat_template(tools=tools)
        return bool(MARKS.search(template))

    def _marks(self, messages: list[Message], tools: Tools) -> list[int]:
        found = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True,
                                                   return_assistant_tokens_mask=True)
        return list(found["assistant_masks"])

    def _marked_text(self, messages: list[Message]) -> tuple[str, str]:
        """The rendered text, and the part of it that the template marks."""
        ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True,
                                                 return_assistant_tokens_mask=True)
        loss_mask = [token for token, mark in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if mark]
        return self._write(messages, None), self.tokenizer.decode(loss_mask)

    def _attempt(self, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str | None:
        """The rendered text of messages, or None if the template refuses them."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                      add_generation_prompt=prompt)
        except FAILURES:
            return None

    def _write(self, messages: list[Message], tools: Tools) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except FAILURES as error:
            raise UserError(self.key, f"the chat template refuses a record ({error}): {shown(messages)}",
                            value=self.value, way_out=remedy(messages, tools, self._takes, TOOL)) from error

    def _takes(self, messages: list[Message], tools: Tools) -> bool:
        return any(self._attempt(fitted, tools) is not None for fitted in (
            self.shape.fit(messages), self._said_nothing(self.shape.fit(messages))))

    def _said_nothing(self, messages: list[Message]) -> list[Message]:
        """The messages, with "" as the content of those that have none."""
        return self.shape.fit_contents([{"content": "", **message} for message in messages])


def _said(message: Message) -> list[str]:
    """Parts of a message that a template writes unchanged: the last line of its text, and the names of its calls."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    names = [call.get("function", call).get("name") for call in message.get("tool_calls") or []]
    return [text.strip().splitlines()[-1].strip() for text in texts if text.strip()] + [name for name in names if name]

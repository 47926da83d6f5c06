"""From a record to tokens, which of them are learnt, and how many bytes of text each stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.errors import UserError
from trainer.experiment.data import Data

Span = tuple[int, int]
LONGEST = 64 * 2**20  # bytes of a document in its file, characters of its text


@dataclass(frozen=True)
class Document:
    """One encoded record.

    Attributes:
        tokens: (n,) int32 ids, end-of-sequence last.
        learnt: (n,) whether the token is a target: false for a prompt.
        bytes: (n,) int32 UTF-8 bytes of text that end with the token; sums over tokens are exact.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Document:
        return Document(self.tokens[part], self.learnt[part], self.bytes[part])


class Encoder:
    """Turns records into documents: plain text, chat messages, or a prompt and its response.

    Everything is decided on characters: a record becomes one text with the spans that are learnt, the text is
    tokenised once, and a token is learnt if it begins inside such a span. So no prefix is tokenised apart from what
    follows it, and the end-of-sequence token is a target by its place, even where it is also the padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data):
        self.tokenizer, self.data = tokenizer, data
        self.end = tokenizer.eos_token_id
        empty = tokenizer("")["input_ids"]
        self.start = [tokenizer.bos_token_id] if empty[:1] == [tokenizer.bos_token_id] != [None] else []
        if data.messages and not tokenizer.chat_template:
            raise UserError("data.messages", "this tokenizer has no chat template to write messages with",
                            value=data.messages, way_out="name another `data.tokenizer.path`, or use `data.prompt` "
                            "and `data.response`, which need none")

    def __call__(self, records: list[dict[str, Any]]) -> list[Document]:
        """Encode a batch of records."""
        texts, spans = [], []
        for record in records:
            text, learnt = self._render(record)
            if len(text) > LONGEST:
                raise UserError("data.path", f"a record has {len(text):,} characters, over {LONGEST:,}: "
                                f"{_shown(text[:200])}", value=self.data.path, way_out="split it into several")
            texts.append(text)
            spans.append(learnt)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True,
                                 return_attention_mask=False, verbose=False)
        return [self._document(text, ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2), learnt)
                for text, ids, offsets, learnt in zip(texts, encoded["input_ids"], encoded["offset_mapping"], spans,
                                                      strict=True)]

    # ---- one text and its learnt spans; None learns all of it

    def _render(self, record: dict[str, Any]) -> tuple[str, list[Span] | None]:
        data = self.data
        if data.messages:
            return self._chat(self._field(record, "messages", list))
        if data.prompt and data.response:
            prompt = self._field(record, "prompt", str)
            response = self._field(record, "response", str)
            if self.tokenizer.chat_template:
                return self._chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
            head = f"{prompt}\n"
            return head + response, [(len(head), len(head) + len(response))]
        return self._plain(self._field(record, "text", str))

    @staticmethod
    def _plain(text: str) -> tuple[str, list[Span] | None]:
        """All of a text is learnt, unless it is white space alone."""
        return text, None if text.strip() else []

    def _field(self, record: dict[str, Any], key: str, kind: type) -> Any:
        return field_of(record, key, getattr(self.data, key), kind)

    def _chat(self, messages: list[Any]) -> tuple[str, list[Span]]:
        """Write messages with the chat template; learn what it adds to say an assistant's message, its end included."""
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
                raise UserError("data.messages", "a record holds a message that is not {role, content}",
                                value=message, way_out="mend or remove the record")
        text = self._template(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:index], add_generation_prompt=True)
            after = self._template(messages[:index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise UserError("data.messages", "the chat template rewrites earlier turns, so it cannot be said which "
                                f"tokens are the assistant's: {_shown(messages)}", value=self.data.messages,
                                way_out="use single-turn records, or a tokenizer whose template only appends")
            spans.append((len(before), len(after)))
        return text, spans

    def _template(self, messages: list[Any], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options) if messages else ""
        # Templates may forbid a system message, or two of one role in a row; and they are programs of other people.
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
                MemoryError) as error:
            raise UserError("data.messages", f"the chat template refuses a record ({error}): {_shown(messages)}",
                            value=self.data.messages, way_out="mend or remove the record") from error

    # ---- tokens of a text

    def _document(self, text: str, ids: list[int], offsets: np.ndarray, spans: list[Span] | None) -> Document:
        # Differences of where tokens end, not lengths: tokens that share one character then share its bytes exactly.
        # Some tokenizers trim white space from offsets, so what is over at the end is the last token's.
        ends = np.maximum.accumulate(offsets[:, 1]) if len(ids) else np.zeros(0, np.int64)
        ends[-1:] = len(text)
        sizes = np.diff(_byte_positions(text)[ends], prepend=0)
        # A token of white space alone is then empty; it begins where the one before it ended.
        begins = np.where(offsets[:, 1] > offsets[:, 0], offsets[:, 0], np.concatenate([[0], ends])[:-1])
        learnt = np.full(len(ids), spans is None)
        for begin, end in spans or []:
            learnt |= (begins >= begin) & (begins < end)
        tokens, start = list(ids), []
        if self.start and tokens[:1] != self.start:
            start = self.start
        # A template may end its last turn itself, perhaps with a newline behind; then nothing is added.
        closed = spans is not None and self.end in tokens[-3:]
        end = [] if closed else [self.end]
        return Document(
            tokens=np.asarray([*start, *tokens, *end], dtype=np.int32),
            learnt=np.concatenate([np.zeros(len(start), bool), learnt, np.full(len(end), self._answered(spans, text))]),
            bytes=np.concatenate([np.zeros(len(start), np.int32), sizes.astype(np.int32),
                                  np.zeros(len(end), np.int32)]),
        )

    @staticmethod
    def _answered(spans: list[Span] | None, text: str) -> bool:
        """Whether the text ends with something learnt, so that its end is learnt too."""
        return spans is None or bool(spans) and spans[-1][1] >= len(text.rstrip())


def field_of(record: dict[str, Any], key: str, name: str, kind: type, place: str = "") -> Any:
    """The value of a record's field.

    Args:
        key: of `data`, under which the field is named.
        place: of the record, for the message.

    Raises:
        UserError: there is none, or of another type.
    """
    value = record.get(name)
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise UserError(f"data.{key}", f"a record has {found} in this field where {kind.__name__} is expected{place}: "
                        f"{_shown(record)}", value=name, way_out="mend or remove the record")
    return value


def _shown(record: Any) -> str:
    """The beginning of a record, to find it by: its number would be one after shuffling."""
    return json.dumps(record, default=str, ensure_ascii=False)[:200]


def _byte_positions(text: str) -> np.ndarray:
    """(len(text) + 1,) UTF-8 bytes before each character."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])

"""Encode records as tokens, with a loss mask and the number of bytes of text for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.chat import ChatTemplate, Sample
from trainer.data.messages import Message, read_conversation, shown
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

LONGEST = 64 * 2**20  # largest document: bytes in its file, or characters of its text


@dataclass(frozen=True)
class Document:
    """One encoded record.

    Attributes:
        tokens: (n,) int32 token ids, with the end-of-sequence token last.
        loss_mask: (n,) bool, whether the token is a target; false for a prompt.
        bytes: (n,) int32 UTF-8 bytes of text attributed to the token; sums over tokens are exact.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Document:
        return Document(self.tokens[part], self.loss_mask[part], self.bytes[part])


class Encoder:
    """Encodes records as documents: plain text, chat messages, or a prompt and its response.

    The loss mask is decided on characters. A record becomes one text with spans that the loss covers (or several texts,
    if its chat template renders earlier turns differently); each text is tokenized once, and a token is a target if it
    begins inside a span. So no prefix is tokenized separately from what follows it, and the end-of-sequence token is a
    target by its position, even if it is also the padding token. A conversation gets the tokens that
    `apply_chat_template` gives it, plus an end-of-sequence token only if nothing closes its last answer.

    Args:
        tokenizer: a fast tokenizer.
        data: names the fields to read.
        as_written: whether a null in a record was written by its author, rather than filled in for a table's column.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data, as_written: bool = False):
        self.tokenizer, self.data, self.as_written = tokenizer, data, as_written
        self.end = tokenizer.eos_token_id
        empty = tokenizer("")["input_ids"]
        self.start = [tokenizer.bos_token_id] if empty[:1] == [tokenizer.bos_token_id] != [None] else []
        key = "messages" if data.messages else "prompt"
        self.chat = None if not learns_chats(tokenizer, data) else ChatTemplate(
            tokenizer, f"data.{key}", getattr(data, key), data.tools is not None, data.system)
        if data.system and self.chat is None:
            raise UserError("data.system", "this tokenizer has no chat template to write a system prompt with",
                            value=data.system, way_out="put it at the beginning of the prompts in the data, and leave "
                            "`data.system` out")

    def __call__(self, records: list[dict[str, Any]]) -> list[Document]:
        """Encode a batch of records."""
        samples = [sample for record in records for sample in self._samples(record)]
        for sample in samples:
            if len(sample.text) > LONGEST:
                raise UserError("data.path", f"a record has {len(sample.text):,} characters, over {LONGEST:,}: "
                                f"{shown(sample.text[:200])}", value=self.data.path, way_out="split it into several")
        if not samples:
            return []
        encoded = self.tokenizer([sample.text for sample in samples], add_special_tokens=False,
                                 return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return [self._document(sample, ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
                for sample, ids, offsets in zip(samples, encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    @property
    def notes(self) -> list[str]:
        """Remarks for the user on how records are rendered."""
        if self.chat is None:
            return []
        by_template = ["prompt and response are written by the chat template, as user and assistant"]
        return [*(by_template if self.data.prompt else []), *self.chat.notes]

    # ---- texts and the spans that the loss covers

    def _samples(self, record: dict[str, Any]) -> list[Sample]:
        data = self.data
        if data.messages:
            return self.chat.samples(read_conversation(record, data, self.as_written))
        if data.prompt and data.response:
            prompt = self._field(record, "prompt", str)
            response = self._field(record, "response", str)
            if self.chat:
                return self.chat.samples(([{"role": "user", "content": prompt},
                                           {"role": "assistant", "content": response}], None))
            head = f"{prompt}\n"
            return [Sample(head + response, [(len(head), len(head) + len(response))],
                           is_open=not response.endswith(self.tokenizer.eos_token))]
        text = self._field(record, "text", str)  # the loss covers all of it, unless it is only white space
        return [Sample(text, [(0, len(text) + 1)] if text.strip() else [], is_open=True)]

    def _field(self, record: dict[str, Any], key: str, kind: type) -> Any:
        return field_of(record, key, getattr(self.data, key), kind)

    # ---- tokens of a text

    def _document(self, sample: Sample, ids: list[int], offsets: np.ndarray) -> Document:
        # Byte counts are differences of end offsets, not lengths, so that tokens which share one character split its
        # bytes exactly. Some tokenizers trim white space from offsets; the last token gets what is left at the end.
        text = sample.text
        ends = np.maximum.accumulate(offsets[:, 1]) if len(ids) else np.zeros(0, np.int64)
        ends[-1:] = len(text)
        sizes = np.diff(_byte_positions(text)[ends], prepend=0)
        # A token of only white space then has an empty span; it begins where the previous token ends.
        begins = np.where(offsets[:, 1] > offsets[:, 0], offsets[:, 0], np.concatenate([[0], ends])[:-1])
        loss_mask = np.zeros(len(ids), bool) if sample.marks is None else np.asarray(sample.marks, bool)
        for begin, end in sample.spans:
            loss_mask |= (begins >= begin) & (begins < end)
        # A chat gets exactly the tokens of `apply_chat_template`, as at inference; other texts get the tokenizer's
        # beginning-of-sequence token.
        start = self.start if self.chat is None and ids[:1] != self.start else []
        end = [self.end] if sample.is_open else []
        return Document(
            tokens=np.asarray([*start, *ids, *end], dtype=np.int32),
            loss_mask=np.concatenate([np.zeros(len(start), bool), loss_mask, np.full(len(end), bool(
                sample.spans or any(sample.marks or [])))]),
            bytes=np.concatenate([np.zeros(len(start), np.int32), sizes.astype(np.int32),
                                  np.zeros(len(end), np.int32)]),
        )


def learns_chats(tokenizer: PreTrainedTokenizerBase, data: Data) -> bool:
    """Whether records become chats, written with the tokenizer's template, rather than texts."""
    return bool(data.messages or (data.prompt and tokenizer.chat_template))


def sample_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[str | list[Message]]:
    """Prompts as a student of this data meets them: of chats, each a conversation with one message of the user's."""
    chat = _chat_of(tokenizer, data)
    return list(texts) if chat is None else [
        chat.shape.fit(chat.with_system([{"role": "user", "content": text}])) for text in texts]


def _chat_of(tokenizer: PreTrainedTokenizerBase, data: Data) -> ChatTemplate | None:
    """The chat template by which a student learns chats, of the first source that has some; None for texts alone."""
    return next((Encoder(tokenizer, part).chat for part in data.parts if learns_chats(tokenizer, part)), None)


def answer_end(tokenizer: PreTrainedTokenizerBase, data: Data) -> int | None:
    """The token that ends an answer, as a student of chats learns it; None for texts, or if several tokens end it."""
    chat = _chat_of(tokenizer, data)
    return None if chat is None else chat.end


def field_of(record: dict[str, Any], key: str, name: str, kind: type, place: str = "") -> Any:
    """The value of a record's field, checked to be of type `kind`.

    Args:
        key: key of `data` that names the field.
        name: name of the field.
        place: where the record is, for the error message.

    Raises:
        UserError: the field is missing or has another type.
    """
    value = record.get(name)
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise UserError(f"data.{key}", f"a record has {found} in this field where {kind.__name__} is expected{place}: "
                        f"{shown(record)}", value=name, way_out="mend or remove the record")
    return value


def _byte_positions(text: str) -> np.ndarray:
    """(len(text) + 1,) number of UTF-8 bytes before each character, and in all."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])

"""The prompts that a teacher is to answer: read like training data, and written as the teacher meets them in use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from trainer.data.encoding import Encoder
from trainer.data.messages import Message, read_conversation
from trainer.data.sources import open_training
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

KINDS = ("messages", "prompt", "text")  # what a record may be, and the field that is looked for in this order


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        number: that of its record, from 1.
        record: what the answer is written beside: `messages` (and `tools`), `prompt`, or `text`.
        ids: its token ids, as the teacher reads them.
    """

    number: int
    record: dict[str, Any]
    ids: list[int]

    def with_answer(self, text: str) -> dict[str, Any]:
        """The record to train on: the conversation, prompt or text with its answer."""
        if "messages" in self.record:
            return {**self.record, "messages": [*self.record["messages"], {"role": "assistant", "content": text}]}
        if "text" in self.record:
            return {"text": self.record["text"] + text}
        return {**self.record, "response": text}


def fields_of(path: str, kind: str | None, field: str | None, cache: Path, **more: Any) -> Data:
    """The data node of prompts.

    Args:
        path: of the prompts, as `data.path`.
        kind: one of `KINDS`; None to take the first whose name is a field of the records.
        field: the field that holds it; None for its own name.
        cache: folder that records are read into.
        more: other keys of `data`.

    Raises:
        UserError: there is nothing at the path, or the records have no such field.
    """
    if kind is not None:
        return _data(path, kind, field or kind, more)
    for name in KINDS:
        data = _data(path, name, name, more if name == "messages" else {**more, "tools": None})
        try:
            open_training(data.model_copy(update={"streaming": True, "split": data.split.partition("[")[0]}), cache)
        except UserError as error:
            if error.key in (f"data.{name}", "data.response"):
                continue
            raise
        return data
    raise UserError("--prompts", "its records have none of the fields messages, prompt and text", value=path,
                    way_out="name the field with --messages, --prompt or --text")


def _data(path: str, kind: str, field: str, more: dict[str, Any]) -> Data:
    fields = {"prompt": field, "response": field} if kind == "prompt" else {kind: field}
    return Data(path=path, **fields, **more)


def read_prompts(data: Data, tokenizer: PreTrainedTokenizerBase, cache: Path, first_tokens: int | None = None
                 ) -> tuple[list[Prompt], Encoder]:
    """All prompts, and the encoder that wrote them.

    A conversation is asked without the assistant's messages at its end; those before stay.

    Args:
        data: says where they are, and which fields to read; see `fields_of`.
        tokenizer: the teacher's.
        cache: folder that records are read into.
        first_tokens: of plain texts, how many tokens of each are the prompt; None for all.

    Raises:
        UserError: a record has no prompt, or the teacher's chat template cannot write it.
    """
    if data.messages and not tokenizer.chat_template:
        raise UserError("--messages", "the teacher's tokenizer has no chat template to write messages with",
                        value=data.messages, way_out="use a teacher that answers chats, or prompts with --prompt or "
                        "--text")
    documents, encoder = open_training(data, cache), Encoder(tokenizer, data)
    as_written = isinstance((documents.features or {}).get(data.messages), datasets.Json)
    return [_prompt(number, record, data, encoder, as_written, first_tokens)
            for number, record in enumerate(documents, 1)], encoder


def _prompt(number: int, record: dict[str, Any], data: Data, encoder: Encoder, as_written: bool,
            first_tokens: int | None) -> Prompt:
    if data.messages:
        messages, tools = read_conversation(record, data, as_written)
        asked = _asked(messages)
        if not asked:
            raise _empty(number, data, "no message to answer")
        kept: dict[str, Any] = {"messages": asked, **({"tools": tools} if tools else {})}
        return Prompt(number, kept, _ids(encoder, encoder.chat.prompt((asked, tools))))
    text = record[data.prompt or data.text]
    if not isinstance(text, str) or not text.strip():
        raise _empty(number, data, "an empty prompt")
    if data.prompt:
        written = f"{text}\n" if encoder.chat is None else encoder.chat.prompt(
            ([{"role": "user", "content": text}], None))
        return Prompt(number, {"prompt": text}, _ids(encoder, written))
    return Prompt(number, *_beginning(text, encoder, first_tokens))


def _asked(messages: list[Message]) -> list[Message]:
    """A conversation up to the last message that is not the assistant's, if anybody has asked something."""
    last = max((at for at, one in enumerate(messages) if one["role"] not in ("assistant", "system", "developer")),
               default=-1)
    return messages[:last + 1]


def _ids(encoder: Encoder, text: str) -> list[int]:
    """Token ids of a text; a chat template writes the beginning of the sequence itself."""
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = encoder.start if encoder.chat is None and ids[:1] != encoder.start else []
    return [*start, *ids]


def _beginning(text: str, encoder: Encoder, tokens: int | None) -> tuple[dict[str, Any], list[int]]:
    """The beginning of a plain text, up to a token that ends with a character, and its ids."""
    if tokens is None:
        return {"text": text}, _ids(encoder, text)
    found = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    while 1 < tokens < len(ids) and offsets[tokens][0] < offsets[tokens - 1][1]:
        tokens -= 1
    ids = ids[:tokens]
    start = encoder.start if ids[:1] != encoder.start else []
    return {"text": text[:offsets[len(ids) - 1][1]]}, [*start, *ids]


def _empty(number: int, data: Data, what: str) -> UserError:
    return UserError("--prompts", f"record {number:,} has {what}", value=data.path, way_out="mend or remove it")


def check_lengths(prompts: Sequence[Prompt], config: PretrainedConfig, new_tokens: int) -> None:
    """Raise `UserError` if the longest prompt with its answer has more tokens than the teacher has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(prompts, key=lambda one: len(one.ids))
    size = len(longest.ids)
    if not positions or positions < 0 or size + new_tokens <= positions:
        return
    if size >= positions:
        raise UserError("--prompts", f"record {longest.number:,} has {size:,} tokens, and the teacher knows "
                        f"{positions:,} positions, with its answer", value=longest.number,
                        way_out="shorten or remove it; of plain texts, --first-tokens takes the beginning alone")
    raise UserError("--new-tokens", f"the teacher knows {positions:,} positions, and record {longest.number:,} has "
                    f"{size:,} tokens", value=new_tokens, way_out=f"--new-tokens {positions - size}, or shorten it")


def digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts, as records and as the teacher reads them."""
    known = hashlib.sha256()
    for one in prompts:
        known.update(json.dumps([one.number, one.record, one.ids], sort_keys=True).encode())
    return known.hexdigest()

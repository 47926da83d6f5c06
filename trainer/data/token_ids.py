"""Records that are tokenized already: lists of token ids, and of labels that say which of them are learned."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.encoding import LONGEST, Document
from trainer.data.local_files import is_integers
from trainer.data.sources import NUMBER
from trainer.data.tokenizers import vocabulary_size
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

NOT_LEARNED = -100  # in labels, as in transformers and torch


class IdEncoder:
    """Checks token ids and labels, and makes documents of them; nothing is added to the ids.

    Labels are those of transformers: one for each id, the id itself or -100, not shifted.

    Args:
        tokenizer: the tokenizer that the ids are of.
        data: names the fields to read.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data):
        self.tokenizer, self.data = tokenizer, data
        self.end, self.start = tokenizer.eos_token_id, []
        self.size = vocabulary_size(tokenizer)

    def __call__(self, records: list[dict[str, Any]]) -> list[Document]:
        """The documents of a batch of records; a record without ids is none.

        Raises:
            UserError: no list of integers, an id outside of the vocabulary, or labels that are not those of the ids.
        """
        return [document for record in records if len(document := self._document(record))]

    def _document(self, record: dict[str, Any]) -> Document:
        ids = self._integers(record, "input_ids")
        outside = np.flatnonzero((ids < 0) | (ids >= self.size))
        if len(outside):
            raise self._wrong(record, "input_ids", f"has id {ids[outside[0]]} at place {outside[0]}, and the "
                              f"tokenizer's ids are 0 to {self.size - 1}", "name the tokenizer that made the ids in "
                              "`data.tokenizer.path`")
        mask = np.ones(len(ids), bool) if self.data.labels is None else self._mask(record, ids)
        return Document(ids.astype(np.int32), mask, self._bytes[ids])

    def _mask(self, record: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        """(ids,) which ids are learned, by their labels."""
        labels = self._integers(record, "labels")
        if len(labels) != len(ids):
            raise self._wrong(record, "labels", f"has {len(labels):,} labels and {len(ids):,} ids",
                              f"write one label for each id: the id itself, or {NOT_LEARNED} where it is not learned")
        mask = labels != NOT_LEARNED
        if len(other := np.flatnonzero(mask & (labels != ids))):
            shifted = len(ids) > 1 and not (mask[:-1] & (labels[:-1] != ids[1:])).any()
            raise self._wrong(record, "labels", f"has label {labels[other[0]]} at place {other[0]}, where the id is "
                              f"{ids[other[0]]}" + (": these labels are shifted by one" if shifted else ""),
                              f"write the id itself, or {NOT_LEARNED}; labels are not shifted")
        return mask

    def _integers(self, record: dict[str, Any], key: str) -> np.ndarray:
        """The list of integers in a field, as int64."""
        value = record.get(getattr(self.data, key))
        if not is_integers(value):
            raise self._wrong(record, key, f"has {_kind(value)} where a list of integers is expected",
                              "mend or remove the record")
        if len(value) > LONGEST:
            raise self._wrong(record, key, f"has {len(value):,} tokens, over {LONGEST:,}", "split it into several")
        return np.asarray(value, np.int64)

    def _wrong(self, record: dict[str, Any], key: str, problem: str, way_out: str) -> UserError:
        number = record.get(NUMBER)
        which = "a record" if number is None else f"record {number:,}"
        return UserError(f"data.{key}", f"{which} {problem}", value=getattr(self.data, key), way_out=way_out)

    @cached_property
    def _bytes(self) -> np.ndarray:
        """(vocabulary,) UTF-8 bytes of text that each token adds to the tokens before it."""
        return np.asarray(token_bytes(self.tokenizer, self.size), np.int32)


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """UTF-8 bytes of text of each of the first `size` ids, after other tokens; 0 for an id that is no token.

    Exact for byte-level tokenizers, one character of whose tokens is one byte. Otherwise it is what a token adds to the
    text of another one, which some decoders treat differently at the very beginning of a text.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if "ByteLevel" in json.dumps(backend.get("decoder")):
        return [len(added[number].encode()) if number in added else len(token or "")
                for number, token in enumerate(tokens)]
    own = [number for number, token in enumerate(tokens) if token and number not in added]
    plain = [number for number in own if re.fullmatch(r"\W?[a-z]+", tokens[number])]
    anchor = next(iter(plain or own), 0)  # tokens of proteins or of another script have no small Latin letter
    before = len(tokenizer.decode([anchor]).encode())
    pairs = tokenizer.batch_decode([[anchor, number] for number in range(size)])
    return [1 if token and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(added[number].encode()) if number in added
            else max(0, len(text.encode()) - before) if token else 0
            for number, (token, text) in enumerate(zip(tokens, pairs, strict=True))]


def _kind(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return "nothing" if value is None else type(value).__name__
    other = next(one for one in value if not is_integers([one]))
    return f"a list with {type(other).__name__} {str(other)[:40]}"

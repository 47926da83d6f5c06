"""Check whether llama.cpp tokenizes text with a tokenizer's added tokens as transformers does.

A tokenizer.json says of an added token whether it absorbs whitespace before (`lstrip`) or after it (`rstrip`), whether
it must be a whole word (`single_word`), and whether text is normalized before the search for it (`normalized`). GGUF
has no fields for any of these: llama.cpp matches the token wherever its characters occur, and keeps whitespace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
AROUND = ("a {} b", "a{}b", "a  {}\n\nb", "{} {}", "a.{}.b")  # texts in which a token is tried
NAMED = 8  # most tokens that a message names


class GgufReading:
    """Tokenizes text as llama.cpp does with a GGUF file of a tokenizer.

    Text is first split at added tokens, longest first; the parts between are pre-tokenized and merged as usual
    (`tokenizer_st_partition` and `cache_special_tokens` in llama-vocab.cpp).

    Args:
        tokenizer: a fast transformers tokenizer, which must treat plain text as llama.cpp does.
    """

    def __init__(self, tokenizer: Any) -> None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self.added = {entry["content"]: entry for entry in spec["added_tokens"]}
        self.longest = sorted(self.added, key=len, reverse=True)
        plain = {**spec, "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
                 "padding": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))

    def ids(self, text: str) -> list[int]:
        """The token ids of a text."""
        parts: list[str | int] = [text]
        for content in self.longest:
            if content and content in text:
                parts = [piece for part in parts for piece in self._cut(part, content)]
        return [number for part in parts for number in (
            [part] if isinstance(part, int) else self._plain.encode(part, add_special_tokens=False).ids)]

    def _cut(self, part: str | int, content: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        for number, piece in enumerate(part.split(content)):
            if number:
                yield self.added[content]["id"]
            if piece:
                yield piece


def read_otherwise(tokenizer: Any, texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that llama.cpp would tokenize differently than transformers."""
    reading = GgufReading(tokenizer)
    for text in texts:
        if reading.ids(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            yield text


def check_added_tokens(tokenizer: Any, texts: list[str]) -> list[str]:
    """Notes on added tokens that llama.cpp tokenizes differently, if they cannot occur in text that matters.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: samples of the training data.

    Raises:
        ValueError: llama.cpp would tokenize differently one of the texts, a token that the chat template uses, or one
            that is not a special token and so can occur in any text.
    """
    wrong = next(read_otherwise(tokenizer, texts), None)
    reading, apart = GgufReading(tokenizer), []
    for content, entry in reading.added.items():
        around = [text.format(*[content] * text.count("{}")) for text in AROUND]
        if next(read_otherwise(tokenizer, around), None) is not None:
            apart.append((content, [flag for flag in FLAGS if entry[flag]]))
    template = str(getattr(tokenizer, "chat_template", None) or "")
    seen = [(content, flags) for content, flags in apart if content in template
            or not reading.added[content]["special"] or (wrong is not None and content in wrong)]
    if wrong is not None and not seen:
        raise ValueError(f"llama.cpp would read text of the data otherwise: {_part(tokenizer, wrong)}")
    if seen:
        every = [*seen, *(one for one in apart if one not in seen)]
        raise ValueError(f"GGUF has no room for how these added tokens are found, and llama.cpp would read text with "
                         f"them otherwise: {_named(every)}. In tokenizer.json set these to false (a tokenizer without "
                         "them reads as llama.cpp does, in training too)")
    return [f"llama.cpp reads text with these tokens otherwise than transformers, since GGUF has no room for how they "
            f"are found: {_named(apart)}"] if apart else []


def _named(tokens: list[tuple[str, list[str]]]) -> str:
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    return ", ".join(f"{content!r} ({', '.join(flags) or 'overlaps another'})"
                     for content, flags in tokens[:NAMED]) + more


def _part(tokenizer: Any, text: str) -> str:
    """The first tokens in which the two tokenizations differ."""
    ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], GgufReading(tokenizer).ids(text)
    place = next((number for number, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
                 min(len(ours), len(theirs)))
    part = slice(max(0, place - 2), place + 4)
    ours, theirs = (tokenizer.convert_ids_to_tokens(ids[part]) for ids in (ours, theirs))
    return f"{ours} as {theirs}"

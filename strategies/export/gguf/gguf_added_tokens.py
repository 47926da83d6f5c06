"""How llama.cpp reads text with a tokenizer's added tokens in it, beside how transformers does.

A tokenizer.json says of an added token whether it takes the blanks before (`lstrip`) or behind it (`rstrip`), whether
it is found as a word alone (`single_word`), and whether text is normalized before it is looked for (`normalized`). A
GGUF file has no room for any of it: llama.cpp finds the token wherever its characters are, and leaves blanks be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
AROUND = ("a {} b", "a{}b", "a  {}\n\nb", "{} {}", "a.{}.b")  # that a token is looked for in
NAMED = 8  # tokens that a message names


class GgufReading:
    """Text read as llama.cpp reads it, by a file made of a tokenizer.

    Text is first cut at the tokens that were added, the longest ones first, and what lies between is cut and merged as
    ever (`tokenizer_st_partition` and `cache_special_tokens` of its llama-vocab.cpp).

    Args:
        tokenizer: fast, of transformers; how it cuts and merges plain text is what llama.cpp is known to do.
    """

    def __init__(self, tokenizer: Any) -> None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self.added = {entry["content"]: entry for entry in spec["added_tokens"]}
        self.longest = sorted(self.added, key=len, reverse=True)
        plain = {**spec, "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
                 "padding": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))

    def ids(self, text: str) -> list[int]:
        """Numbers of tokens."""
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
    """The texts that llama.cpp would give other tokens than transformers."""
    reading = GgufReading(tokenizer)
    for text in texts:
        if reading.ids(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            yield text


def check_added_tokens(tokenizer: Any, texts: list[str]) -> list[str]:
    """What is to be said of added tokens that llama.cpp reads otherwise, where no text that matters has them.

    Args:
        tokenizer: fast, of transformers.
        texts: of the data.

    Raises:
        ValueError: it reads one of the texts otherwise, a token that the chat template writes, or one that is no
            special token and so can be in any text.
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
    """The beginning of where two readings part."""
    ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], GgufReading(tokenizer).ids(text)
    place = next((number for number, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
                 min(len(ours), len(theirs)))
    part = slice(max(0, place - 2), place + 4)
    ours, theirs = (tokenizer.convert_ids_to_tokens(ids[part]) for ids in (ours, theirs))
    return f"{ours} as {theirs}"

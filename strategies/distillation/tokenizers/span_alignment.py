"""Align two tokenizers: find positions where both models have read the same text, and so predict the same continuation.

Alignment is by bytes of text. The student's tokens are decoded and the text is tokenized again for the teacher. Where a
token of both ends after the same byte, both models have read the same prefix. The offsets that tokenizers return are
not used: if a character is split into several tokens they repeat the whole character, and some trim white space.
Instead the teacher's tokens are decoded too and compared with the text, which also reveals any change its tokenizer
makes. Predictions at aligned positions are compared without a common vocabulary, by sorted probabilities ("universal
logit distillation", Boizard et al. 2024, arXiv 2402.12030).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from strategies.distillation.losses.tiled_loss import IGNORED

SPELLED = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")  # decoders that only concatenate
LONGEST = 1 << 20  # more tokens than any row has
CONTINUING = bytes(range(0x80, 0xC0))  # UTF-8 bytes that do not begin a character


@dataclass(frozen=True)
class TeacherRow:
    """A student's row in the teacher's tokens, and the positions at which the two can be compared.

    Attributes:
        input_ids: (capacity,) int64 teacher's tokens of the documents that have targets, padded at the end.
        position_ids: (capacity,) int64, restarting at 0 with every document.
        student_at, teacher_at: (pairs,) int64 positions after the same text; `student_at` ascends within a row.
        loss_mask: number of student positions that have a target.
        documents: number of documents with such a position.
        changed: how many of these have no pairs, because their text cannot be traced: the teacher's tokenizer changes
            it, the student's has unknown tokens in it, or it is not UTF-8.
        beyond: pairs lost because the teacher needs more tokens than `capacity`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    student_at: torch.Tensor
    teacher_at: torch.Tensor
    loss_mask: int
    documents: int
    changed: int
    beyond: int

    @property
    def aligned(self) -> int:
        """Number of student positions with a target that have a counterpart."""
        return len(self.student_at)


class SpanAligner:
    """Tokenizes rows of a student again for its teacher, and finds the positions after the same text.

    For the teacher, each document begins with its beginning-of-sequence token if its tokenizer adds one, and the
    student's end-of-sequence token becomes the teacher's. So both predict the end after the last byte of the text.

    The text is what the student's tokens decode to: if its tokenizer normalizes text, the teacher reads the normalized
    text. A document may have been cut anywhere, even within a character: the teacher then gets its whole characters,
    and the remaining bytes are not compared.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers.
        capacity: number of tokens in a row of the teacher.

    Raises:
        ValueError: a tokenizer is not fast, its decoder does more than concatenate tokens, or `capacity` is below 1.
    """

    def __init__(self, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase,
                 capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: a row of the teacher has at least one token")
        self.capacity, self.tokenizer = capacity, teacher_tokenizer
        self.bos, self.unknown = student_tokenizer.bos_token_id, student_tokenizer.unk_token_id
        if self.unknown in (None, self.bos, student_tokenizer.eos_token_id):  # no token marks unknown text
            self.unknown = -1
        roles = {getattr(student_tokenizer, f"{role}_token_id"): getattr(teacher_tokenizer, f"{role}_token") or ""
                 for role in ("bos", "eos")}
        self.student = Spelling("student_tokenizer", student_tokenizer, roles)
        self.teacher = Spelling("teacher_tokenizer", teacher_tokenizer, {})
        begin = teacher_tokenizer.bos_token_id
        self.begin = [begin] if teacher_tokenizer("")["input_ids"][:1] == [begin] else []
        pad = teacher_tokenizer.pad_token_id
        self.padding = (teacher_tokenizer.eos_token_id or 0) if pad is None else pad

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> TeacherRow:
        """Align one row.

        Args:
            input_ids: (n,) the student's tokens.
            position_ids: (n,) rising by one within a document.
            targets: (n,) the next token at each position, or `IGNORED`.
        """
        tokens, loss_mask = input_ids.numpy(), targets.numpy() != IGNORED
        begins = np.flatnonzero(np.diff(position_ids.numpy(), prepend=-2) != 1)
        parts = [slice(*ends) for ends in zip(begins, [*begins[1:], len(tokens)], strict=True)]
        parts = [part for part in parts if loss_mask[part].any()]
        read = [text for part in parts if (text := self._read(tokens[part], part.start)) is not None]
        ids: list[int] = []
        positions, pairs = [], []
        for text, theirs in zip(read, self._cut([text.text for text in read]), strict=True):
            if (found := self._pairs(text, theirs)) is not None:
                pairs.append(found + [[text.start], [len(ids)]])
                ids += self.begin + theirs
                positions += range(len(self.begin) + len(theirs))
        found = np.concatenate([np.zeros((2, 0), np.int64), *pairs], 1)
        student_at, teacher_at = found[:, loss_mask[found[0]]]
        kept = teacher_at < self.capacity
        return TeacherRow(self._row(ids, self.padding), self._row(positions, None), torch.from_numpy(student_at[kept]),
                          torch.from_numpy(teacher_at[kept]), int(loss_mask.sum()), len(parts),
                          len(parts) - len(pairs), int((~kept).sum()))

    def _read(self, tokens: np.ndarray, start: int) -> _Text | None:
        """The text of a document as the student read it; None if its tokens do not determine it."""
        if (tokens == self.unknown).any():
            return None
        begun = int(tokens[0] == self.bos)
        raw, sizes = self.student(tokens[begun:], True)
        halves = len(raw) - len(raw.lstrip(CONTINUING))  # continuation bytes of a character that was cut off
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(raw[halves:])
        except UnicodeDecodeError:
            return None
        ends = np.concatenate([np.zeros(begun, np.int64), sizes.cumsum() - halves])
        return _Text(text, start, np.where(ends > 0, ends, -1) if halves else ends, bool(begun))

    def _cut(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts for the teacher."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _pairs(self, read: _Text, ids: list[int]) -> np.ndarray | None:
        """(2, pairs) student's and teacher's positions after the same bytes; None if the teacher reads other bytes.

        If several tokens of one model end after the same byte, like a beginning-of-sequence token and the space that a
        tokenizer adds before a text, they are matched from the last one backward.
        """
        text = read.text.encode()
        for dummies in (False, True):  # " a" and "a" can be the same tokens
            raw, sizes = self.teacher(np.asarray(ids, np.int64), dummies)
            if raw == text:
                # The teacher's beginning-of-sequence token has a counterpart only if the student has one too.
                begin = np.full(len(self.begin), 0 if read.begun else -1)
                theirs = np.concatenate([begin, sizes.cumsum()])
                keys, *at = np.intersect1d(_keys(read.ends), _keys(theirs), assume_unique=True, return_indices=True)
                return np.stack(at)[:, keys >= 0]
        return None

    def _row(self, values: list[int], padding: int | None) -> torch.Tensor:
        """A row for the teacher, padded with a token, or with the positions of one more document if that is None."""
        rest = max(0, self.capacity - len(values))
        return torch.tensor(values[:self.capacity] + (list(range(rest)) if padding is None else [padding] * rest))


@dataclass(frozen=True)
class _Text:
    """A document as the student read it, and the byte where each token (n,) ends; -1 if not within the text."""

    text: str
    start: int
    ends: np.ndarray
    begun: bool


def _keys(ends: np.ndarray) -> np.ndarray:
    """(n,) keys, equal for tokens to be paired: the byte where a token ends, then its rank from the last there."""
    before_last = np.searchsorted(ends, ends, side="right") - 1 - np.arange(len(ends))
    return (ends + 1) * LONGEST - 1 - before_last


class Spelling:
    """The bytes of text that each token of a tokenizer decodes to.

    Args:
        name: name of the caller's argument, for error messages.
        tokenizer: a fast tokenizer.
        replaced: text that replaces that of some ids.

    Raises:
        ValueError: the tokenizer is not fast, or its decoder does more than concatenate tokens.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, replaced: Mapping[int | None, str]) -> None:
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        read, bytewise = _reader(name, tokenizer)
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            literal = number in added and (bytewise or added[number].special)
            pieces[number] = token.encode() if literal else read(token)
        for number, text in replaced.items():
            if number is not None:
                pieces[number] = text.encode()
        self.sizes = np.array([len(piece) for piece in pieces])
        self.begins = self.sizes.cumsum() - self.sizes
        self.spelled = np.frombuffer(b"".join(pieces), np.uint8)
        self.spaced = np.array([piece.startswith(b" ") for piece in pieces])
        self.twice = np.array([piece.startswith(b"  ") for piece in pieces])
        self.added = np.isin(np.arange(len(pieces)), list(added))
        self.at_begin = self._puts_space(tokenizer, "")
        self.after_added = self._puts_space(tokenizer, tokenizer.eos_token or "")
        both = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a")]
        self.once = both[0] == both[1]  # no space is added to a text that begins with one

    def _puts_space(self, tokenizer: PreTrainedTokenizerBase, before: str) -> bool:
        """Whether the tokenizer adds a space before text that follows `before`."""
        ids = tokenizer.encode(f"{before}a", add_special_tokens=False)
        return bool(self.spaced[ids[1 if before else 0:][:1]].any())

    def __call__(self, ids: np.ndarray, dummies: bool) -> tuple[bytes, np.ndarray]:
        """The bytes of some tokens (n,), and the number of bytes of each (n,).

        Args:
            ids: tokens of a document from the beginning of its text.
            dummies: leave out spaces that the tokenizer adds before a text and after added tokens.
        """
        begins, sizes = self.begins[ids], self.sizes[ids]
        if dummies:
            dummy = self._dummies(ids)
            begins, sizes = begins + dummy, sizes - dummy
        ends = sizes.cumsum()
        at = np.repeat(begins - ends + sizes, sizes) + np.arange(sizes.sum())
        return self.spelled[at].tobytes(), sizes

    def _dummies(self, ids: np.ndarray) -> np.ndarray:
        """(n,) whether a token begins with a space that the tokenizer added."""
        behind = np.concatenate([[self.at_begin], self.added[ids[:-1]] & self.after_added])[:len(ids)]
        dummy = behind & self.spaced[ids]
        if self.once:
            another = np.concatenate([self.spaced[ids[1:]], [False]])[:len(ids)]
            dummy &= ~(self.twice[ids] | (self.sizes[ids] == 1) & another)
        return dummy


def _reader(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], bytes], bool]:
    """A function that decodes a single token to bytes, and whether the vocabulary is byte-level."""
    if not tokenizer.is_fast:
        raise ValueError(f"{name} = {type(tokenizer).__name__} does not say what its tokens stand for; give a fast "
                         "tokenizer, one with a tokenizer.json")
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {"type": "none at all"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = ["Replace by a pattern" if "Regex" in step.get("pattern", {}) else step["type"] for step in steps]
    if strange := next((kind for kind in kinds if kind not in SPELLED), None):
        raise ValueError(f"{name} = {type(tokenizer).__name__} has a decoder ({strange}) that does not simply join the "
                         f"text of tokens, so it cannot be said which text one ends; {', '.join(SPELLED)} do")
    if "ByteLevel" in kinds:
        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        return partial(_read_bytes, alphabet=alphabet), True
    return partial(_read_piece, steps=steps), False


def _read_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """Decode a token of a byte-level vocabulary; with a character outside the byte alphabet it is literal text."""
    known = all(character in alphabet for character in token)
    return bytes(alphabet[character] for character in token) if known else token.encode()


def _read_piece(token: str, steps: list[dict[str, Any]]) -> bytes:
    """Decode a SentencePiece token: space markers become spaces, and `<0xE2>` a single byte."""
    for step in steps:
        if step["type"] == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
    return token.encode()

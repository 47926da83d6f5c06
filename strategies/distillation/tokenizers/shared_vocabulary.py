"""Which columns of two output heads mean the same token, and when two tokenizers are one.

Models of one family seldom agree on the size of their heads: one is padded to a multiple of 128, another has a few
chat markers more. Filling the shorter one up with zero logits gives its models probability for tokens that they do not
have, and identical models then a divergence above zero. So distributions are compared on the common tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from strategies.distillation.losses.teacher_targets import SharedVocabulary

ENOUGH = 0.95  # share of the larger vocabulary that one tokenizer may be said to be the other with
ROLES = ("eos_token", "bos_token")
IDLE = {  # settings that change neither how text is cut nor how tokens are spelled; vocabularies are compared apart
    "normalizer": set(), "pre_tokenizer": {"trim_offsets"},
    "decoder": {"trim_offsets", "add_prefix_space", "use_regex"},
    "model": {"vocab", "merges", "unk_token", "unk_id", "fuse_unk"}}


@dataclass(frozen=True)
class Alignment:
    """The tokens that student and teacher have in common.

    Attributes:
        student, teacher: (common,) int64 columns of the two heads that mean one token, in rising student id. No
            column occurs twice.
        to_teacher: (student_size,) int64 teacher's id of each of the student's, or -1 where it has none. Two may have
            one id, where the teacher begins and ends a text with the same token; text with a -1 cannot be given to it.
        teacher_size: columns of the teacher's head.
        of_student, of_teacher: share of each one's tokens that the other has too; columns that only pad a head are no
            tokens.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    to_teacher: torch.Tensor
    teacher_size: int
    of_student: float
    of_teacher: float

    @property
    def is_prefix(self) -> bool:
        """Whether the common tokens are the first columns of both heads, in one order, so that slices suffice."""
        first = torch.arange(len(self.student))
        return torch.equal(self.student, first) and torch.equal(self.teacher, first)

    @property
    def common(self) -> SharedVocabulary | None:
        """What the loss needs to know; None where every column of both heads is common, at the same place."""
        if not self.is_prefix:
            return SharedVocabulary(len(self.student), self.student, self.teacher)
        if len(self.student) == len(self.to_teacher) == self.teacher_size:
            return None
        return SharedVocabulary(len(self.student))


def align(student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], student_size: int, teacher_size: int,
          roles: Mapping[str, str] | None = None) -> Alignment:
    """Match the columns of two heads by the strings of their tokens.

    A token whose id lies beyond its head has no logit, and is left out.

    Args:
        student_vocab, teacher_vocab: id of each token string, added tokens included.
        student_size, teacher_size: columns of each head; those that no string belongs to only pad it.
        roles: the teacher's string for each token that is spelled otherwise there; see `same_roles`.

    Raises:
        ValueError: no token is common.
    """
    roles = roles or {}
    ours = {token: number for token, number in student_vocab.items() if number < student_size}
    theirs = {token: number for token, number in teacher_vocab.items() if number < teacher_size}
    known = theirs | {token: theirs[other] for token, other in roles.items() if other in theirs}
    numbers, columns = [-1] * student_size, {}
    for token in [*roles, *ours]:  # what has the role goes before what merely has the name
        if token in ours and token in known:
            numbers[ours[token]] = known[token]
            columns.setdefault(known[token], ours[token])
    if not columns:
        raise ValueError(f"student_vocab and teacher_vocab, of {len(ours)} and {len(theirs)} tokens, have no token in "
                         "common; compare their distributions by spans of text, with SpanAligner and uld")
    to_teacher, student = torch.tensor(numbers), torch.tensor(sorted(columns.values()))
    return Alignment(student, to_teacher[student], to_teacher, teacher_size, len(student) / len(ours),
                     len(student) / len(theirs))


def same_roles(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, str]:
    """The teacher's string for the student's end and beginning of sequence, where the two are spelled differently.

    A string that the teacher also has keeps its own meaning: where a base model ends with `<|endoftext|>` and its chat
    model with `<|im_end|>`, and both have both, each is compared with its like.
    """
    known, roles = teacher.get_vocab(), {}
    for role in ROLES:
        ours, theirs = getattr(student, role), getattr(teacher, role)
        if ours and theirs and ours not in known:
            roles.setdefault(ours, theirs)
    return roles


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Whether the tokens of one can be given to a model of the other, and why (not), in words.

    They are the same if they cut and spell text the same way:

    - normalizer, pre-tokenizer, decoder and the kind of model are equal, apart from settings that do not act on text;
    - at least 95% of the larger vocabulary, without added tokens, is in the other one too;
    - the merges of one are the beginning of the other's (BPE), or common pieces have the same score (Unigram).

    Added tokens, ids, special tokens and what is put around a text may differ: `align` maps them. The share keeps out
    the vocabulary that was stopped early: all its merges are the other's, but it cuts text into pieces that the other
    one's models have hardly ever seen.

    Raises:
        ValueError: a tokenizer is not a fast one.
    """
    first, second = _description("a", a), _description("b", b)
    for part, idle in IDLE.items():
        one, other = _acting(first[part], idle), _acting(second[part], idle)
        if one != other:
            return False, f"the {part}s differ: {_short(one)} and {_short(other)}"
    ours, theirs = _pieces(first["model"]), _pieces(second["model"])
    share = len(ours.keys() & theirs.keys()) / max(len(ours), len(theirs), 1)
    in_words = f"{share:.1%} of the larger vocabulary ({len(ours)} and {len(theirs)} tokens) are common"
    if share < ENOUGH:
        return False, f"only {in_words}, and one tokenizer needs {ENOUGH:.0%}"
    if difference := _cut_differently(first["model"], second["model"], ours, theirs):
        return False, difference
    return True, f"text is cut and spelled the same way, and {in_words}"


def _description(name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise ValueError(f"{name} = {type(tokenizer).__name__} does not say how it cuts text; give a fast tokenizer, "
                         "one with a tokenizer.json")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _acting(part: Any, idle: set[str]) -> Any:
    """What acts on text in a part of a description; None, "" and false all say that a setting is not in use."""
    if isinstance(part, list):
        return [_acting(one, idle) for one in part]
    if isinstance(part, dict):
        return {key: _acting(value, idle) for key, value in part.items() if value and key not in idle}
    return part


def _short(part: Any) -> str:
    return json.dumps(part, ensure_ascii=False)[:150]


def _pieces(model: dict[str, Any]) -> dict[str, float]:
    """Strings of a model's own vocabulary, with their score where it has scores."""
    vocabulary = model["vocab"]
    return dict.fromkeys(vocabulary, 0.0) if isinstance(vocabulary, dict) else dict(map(tuple, vocabulary))


def _cut_differently(first: dict[str, Any], second: dict[str, Any], ours: dict[str, float], theirs: dict[str, float]
                     ) -> str | None:
    """The first merge or score at which two models part."""
    for rank, (one, other) in enumerate(zip(first.get("merges", []), second.get("merges", []), strict=False)):
        if one != other:
            return f"merge {rank} joins {one} in one and {other} in the other"
    for piece, score in ours.items():
        if abs(theirs.get(piece, score) - score) > 1e-6:
            return f"{piece!r} has the score {score:g} in one and {theirs[piece]:g} in the other"
    return None

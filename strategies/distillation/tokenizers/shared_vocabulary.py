"""Which columns of two output heads mean the same token, and whether two tokenizers are the same.

Models of one family often differ in the size of their heads: one is padded to a multiple of 128, another has a few more
chat markers. Padding the smaller head with zero logits would give probability to tokens that its model does not have,
and identical models would then have a divergence above zero. So distributions are compared on the common tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from strategies.distillation.losses.teacher_targets import SharedVocabulary

ENOUGH = 0.95  # least common share of the larger vocabulary with which two tokenizers count as the same
ROLES = ("eos_token", "bos_token")
IDLE = {  # settings that affect neither splitting nor decoding of text; vocabularies are compared separately
    "normalizer": set(), "pre_tokenizer": {"trim_offsets"},
    "decoder": {"trim_offsets", "add_prefix_space", "use_regex"},
    "model": {"vocab", "merges", "unk_token", "unk_id", "fuse_unk"}}


@dataclass(frozen=True)
class Alignment:
    """The tokens that student and teacher have in common.

    Attributes:
        student, teacher: (common,) int64 columns of the two heads that mean the same token, by ascending student id. No
            column occurs twice.
        to_teacher: (student_size,) int64 teacher id of each student id, or -1 if the teacher lacks it; text with such a
            token cannot be passed to the teacher. Two student ids may have the same teacher id, if the teacher begins
            and ends a text with the same token.
        teacher_size: number of columns of the teacher's head.
        of_student, of_teacher: share of each model's tokens that the other has too; columns that only pad a head are
            not counted as tokens.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    to_teacher: torch.Tensor
    teacher_size: int
    of_student: float
    of_teacher: float

    @property
    def is_prefix(self) -> bool:
        """Whether the common tokens are the first columns of both heads, in the same order, so that slices suffice."""
        first = torch.arange(len(self.student))
        return torch.equal(self.student, first) and torch.equal(self.teacher, first)

    @property
    def common(self) -> SharedVocabulary | None:
        """The columns that the loss compares; None if both heads have the same tokens in the same columns."""
        if not self.is_prefix:
            return SharedVocabulary(len(self.student), self.student, self.teacher)
        if len(self.student) == len(self.to_teacher) == self.teacher_size:
            return None
        return SharedVocabulary(len(self.student))


def align(student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], student_size: int, teacher_size: int,
          roles: Mapping[str, str] | None = None) -> Alignment:
    """Match the columns of two heads by the strings of their tokens.

    A token whose id lies beyond its head has no logit and is left out.

    Args:
        student_vocab, teacher_vocab: id of each token string, including added tokens.
        student_size, teacher_size: number of columns of each head; columns without a string are padding.
        roles: maps special tokens of the student to the teacher's different strings for them; see `same_roles`.

    Raises:
        ValueError: the two have no token in common.
    """
    roles = roles or {}
    ours = {token: number for token, number in student_vocab.items() if number < student_size}
    theirs = {token: number for token, number in teacher_vocab.items() if number < teacher_size}
    known = theirs | {token: theirs[other] for token, other in roles.items() if other in theirs}
    numbers, columns = [-1] * student_size, {}
    for token in [*roles, *ours]:  # a match by role takes precedence over one by string
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
    """The teacher's strings for the student's end and beginning of sequence, where they differ.

    A student string that the teacher has too keeps its meaning: if a base model ends with `<|endoftext|>` and its chat
    model with `<|im_end|>`, and both models have both tokens, each is matched with itself.
    """
    known, roles = teacher.get_vocab(), {}
    for role in ROLES:
        ours, theirs = getattr(student, role), getattr(teacher, role)
        if ours and theirs and ours not in known:
            roles.setdefault(ours, theirs)
    return roles


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Whether tokens of one tokenizer can be passed to a model of the other, and the reason in words.

    Two tokenizers are the same if they split text alike and their tokens decode alike:

    - normalizer, pre-tokenizer, decoder and type of model are equal, apart from settings that do not act on text;
    - at least 95% of the larger vocabulary, without added tokens, is in the other one too;
    - the merges of one are a prefix of the other's (BPE), or common pieces have the same score (Unigram).

    Ids, added tokens, special tokens and those that are put around a text may differ: `align` maps them. The 95% rule
    out a BPE vocabulary whose training was stopped early: all its merges are the other's, but it splits text into
    pieces that the other's models have hardly ever seen.

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
    """The settings of a component that act on text; None, "" and false all mean that a setting is not in use."""
    if isinstance(part, list):
        return [_acting(one, idle) for one in part]
    if isinstance(part, dict):
        return {key: _acting(value, idle) for key, value in part.items() if value and key not in idle}
    return part


def _short(part: Any) -> str:
    return json.dumps(part, ensure_ascii=False)[:150]


def _pieces(model: dict[str, Any]) -> dict[str, float]:
    """The strings of a model's vocabulary with their scores; 0 for a model without scores."""
    vocabulary = model["vocab"]
    return dict.fromkeys(vocabulary, 0.0) if isinstance(vocabulary, dict) else dict(map(tuple, vocabulary))


def _cut_differently(first: dict[str, Any], second: dict[str, Any], ours: dict[str, float], theirs: dict[str, float]
                     ) -> str | None:
    """The first merge or score in which two models differ, in words; None if there is none."""
    for rank, (one, other) in enumerate(zip(first.get("merges", []), second.get("merges", []), strict=False)):
        if one != other:
            return f"merge {rank} joins {one} in one and {other} in the other"
    for piece, score in ours.items():
        if abs(theirs.get(piece, score) - score) > 1e-6:
            return f"{piece!r} has the score {score:g} in one and {theirs[piece]:g} in the other"
    return None

"""The forms that teacher targets for a micro-batch can take: hidden states, logits, drawn tokens, or the top k."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from strategies.distillation.losses.heads import Head


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's last hidden states and its head, from which logits are computed one tile of positions at a time.

    Attributes:
        hidden: (..., width).
        head: the teacher's output head.
    """

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class LogitTargets:
    """The teacher's logits (..., vocabulary), any floating dtype."""

    logits: torch.Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Tokens sampled from the teacher, with their frequencies (Anshumann et al. 2025, arXiv 2503.16870).

    Attributes:
        ids: (..., draws) tokens.
        shares: (..., draws) how often each was drawn, over the number of draws; 0 in unused slots.
        log_p: (..., draws) the teacher's log-probability of each at `temperature`.
        temperature: at which they were drawn.
    """

    ids: torch.Tensor
    shares: torch.Tensor
    log_p: torch.Tensor
    temperature: float


@dataclass(frozen=True)
class TopTargets:
    """The teacher's k most probable tokens at a temperature, and the total probability of all others.

    Attributes:
        ids: (..., k) tokens.
        log_p: (..., k) log-probability of each.
        log_tail: (...) log of the total probability of all others.
        temperature: of the softmax.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_tail: torch.Tensor
    temperature: float


Targets = HiddenTargets | LogitTargets | SampledTargets | TopTargets


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that student and teacher both have, as columns of their logits.

    Attributes:
        size: number of common tokens.
        student, teacher: (size,) column of each common token; None if these are the first `size` columns.
        teacher_size: number of the teacher's columns, for vocabularies with nothing in common, which are compared by
            rank (uld); None for `size`.
    """

    size: int
    student: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    teacher_size: int | None = None

    def __post_init__(self) -> None:
        if (self.student is None) != (self.teacher is None):
            raise ValueError("columns are given for both models, or for neither")

"""What a teacher says about the positions of a micro-batch, in the forms in which a student can be given it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from strategies.distillation.losses.heads import Head


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's last hidden states, and its head: logits exist for a tile of positions at a time.

    Attributes:
        hidden: (..., width).
        head: the teacher's.
    """

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class LogitTargets:
    """The teacher's logits (..., vocabulary), any floating dtype."""

    logits: torch.Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the softened teacher, with how often (Anshumann et al. 2025, arXiv 2503.16870).

    Attributes:
        ids: (..., draws) tokens.
        shares: (..., draws) count of each over all draws; 0 where a place is not used.
        log_p: (..., draws) the softened teacher's log-probability of each.
        temperature: at which they were drawn.
    """

    ids: torch.Tensor
    shares: torch.Tensor
    log_p: torch.Tensor
    temperature: float


@dataclass(frozen=True)
class TopTargets:
    """The softened teacher's most probable tokens, and the mass of all others as one.

    Attributes:
        ids: (..., k) tokens.
        log_p: (..., k) log-probability of each.
        log_tail: (...) log of the mass of all others.
        temperature: of the softening.
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
        student, teacher: (common,) column of each; None where it is the first `size` ones.
        size: how many.
        teacher_size: of the teacher, where vocabularies that have nothing in common are compared (uld); None: as many.
    """

    size: int
    student: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    teacher_size: int | None = None

    def __post_init__(self) -> None:
        if (self.student is None) != (self.teacher is None):
            raise ValueError("columns are given for both models, or for neither")

"""Response distillation: cross-entropy with the text and divergences from the teacher, as sums over target tokens.

Sums, not means: the caller divides by the true number of tokens over micro-batches and processes, which no single
micro-batch knows. Given hidden states and output heads, no logits of more than a tile of positions ever exist; see
`strategies.distillation.losses.tiled_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from strategies.distillation.losses.divergences import NAMES, Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.logit_blocks import Terms
from strategies.distillation.losses.teacher_targets import (
    LogitTargets,
    SampledTargets,
    SharedVocabulary,
    Targets,
    TopTargets,
)
from strategies.distillation.losses.tiled_loss import IGNORED, HeadCall, LogitLoss, TiledLoss

SPARSE = {SampledTargets: ("forward_kl",), TopTargets: tuple(name for name in NAMES if name != "uld")}


@dataclass(frozen=True)
class ResponseObjective:
    """`cross_entropy * CE + z_loss * log(Z)^2 + sum of weight * divergence`, each weight exactly as given.

    Source: survey eq. 15-16; Hinton et al. 2015.

    Attributes:
        cross_entropy: weight of the cross-entropy with the next token of the text.
        divergences: from the teacher, with their weights.
        label_smoothing: share of the target spread evenly over the student's vocabulary, in [0, 1).
        z_loss: weight of the squared logarithm of the normalizer.

    Raises:
        ValueError: a number out of range, no term at all, or one divergence twice.
    """

    cross_entropy: float = 1.0
    divergences: tuple[Divergence, ...] = (Divergence(temperature=2.0),)
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is a weight from zero on, not {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share in [0, 1), not {self.label_smoothing}")
        names = [one.name for one in self.divergences]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the divergence {twice} is given twice; give it once, with the weight of both")
        if not self.terms.names:
            raise ValueError("every weight of the objective is zero")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to be asked at all."""
        return any(one.weight for one in self.divergences)

    @property
    def terms(self) -> Terms:
        """What is summed over blocks of logits."""
        return Terms(self.cross_entropy, self.label_smoothing, self.z_loss, self.divergences)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | Targets | None, targets: torch.Tensor, *,
                 head: Head | None = None, common: SharedVocabulary | None = None, asked: torch.Tensor | None = None,
                 tile: int | None = None, accumulate: torch.dtype = torch.float32, learned: torch.Tensor | None = None
                 ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted loss, and each term unweighted and detached, in `accumulate`, summed over target tokens.

        The gradient of the loss reaches hidden states, weight and bias of the student's head, and nothing else.

        Args:
            student: (..., width) hidden states as they enter `head`, or without one (..., vocabulary) logits. What is
                at a position predicts `targets` there, already shifted.
            teacher: its logits (..., vocabulary), `HiddenTargets` with its head, or what is left of them in
                `SampledTargets` and `TopTargets`; None where no divergence has a weight.
            targets: (...) token ids, or `IGNORED`.
            head: the student's; under autocast products are made in its dtype, and summed in fp32.
            common: the tokens both have, where the vocabularies differ; no other token takes part in a divergence.
            asked: (...) positions that the teacher says something about; all by default.
            tile: bytes of logits that may exist at a time; by default what a device works on without loss of speed.
            accumulate: dtype of what is made on the way. float64 for a student so near, or logits so large, that fp32
                products of hidden states and head say too little.
            learned: (n,) flat positions that have a target, where that is known; else they are looked for, which a GPU
                is waited for.

        Raises:
            ValueError: shapes, vocabularies or temperatures that do not fit each other.
        """
        if student.shape[:-1] != targets.shape:
            what = "logits" if head is None else "hidden states"
            raise ValueError(f"{what} of shape {tuple(student.shape)} cannot predict targets of shape "
                             f"{tuple(targets.shape)}")
        teacher_targets = LogitTargets(teacher) if isinstance(teacher, torch.Tensor) else teacher
        if self.needs_teacher:
            self._check_teacher(
                teacher_targets, student.shape[-1] if head is None else head.vocabulary, targets, common
            )
        flat, said = student.flatten(0, -2), None
        if self.needs_teacher and teacher_targets is not None:
            said = _flat(teacher_targets, targets.ndim)
        call = HeadCall(self.terms, None if head is None else head.detached(), targets.flatten(), said, common,
                    None if asked is None else asked.flatten(), tile, learned, accumulate)
        if head is None:
            loss, values = LogitLoss.apply(flat, call)
        else:
            loss, values = TiledLoss.apply(flat, head.weight, head.bias, call)
        return loss, dict(zip(call.terms.names, values, strict=True))

    def _check_teacher(
        self, teacher_targets: Targets | None, vocabulary: int, targets: torch.Tensor, common: SharedVocabulary | None
    ) -> None:
        if teacher_targets is None:
            raise ValueError("a divergence has a weight, and there is no teacher to diverge from")
        first = getattr(teacher_targets, fields(teacher_targets)[0].name)
        if first.shape[:-1] != targets.shape:
            raise ValueError(f"the teacher's tensor of shape {tuple(first.shape)} does not belong to targets of shape "
                             f"{tuple(targets.shape)}")
        used = [one for one in self.divergences if one.weight]
        if isinstance(teacher_targets, (SampledTargets, TopTargets)):
            for one in used:
                if one.name not in SPARSE[type(teacher_targets)]:
                    raise ValueError(
                        f"{one.name} needs the teacher's whole distribution; {type(teacher_targets).__name__} "
                        f"serve {', '.join(SPARSE[type(teacher_targets)])}"
                    )
                if one.temperature != teacher_targets.temperature:
                    raise ValueError(
                        f"the targets were made at temperature {teacher_targets.temperature}, and {one.name} is "
                        f"taken at {one.temperature}"
                    )
            return
        theirs = (
            teacher_targets.logits.shape[-1]
            if isinstance(teacher_targets, LogitTargets)
            else teacher_targets.head.vocabulary
        )
        if theirs != vocabulary and common is None and any(one.name != "uld" for one in used):
            raise ValueError(f"student and teacher logits are over {vocabulary} and {theirs} tokens: say in `common` "
                             "which tokens they share, or use the divergence uld")


def _flat(teacher_targets: Targets, dimensions: int) -> Targets:
    """The same with all positions in one dimension."""
    return replace(teacher_targets, **{field.name: getattr(teacher_targets, field.name).flatten(0, dimensions - 1)
                              for field in fields(teacher_targets) if field.name not in ("temperature", "head")})


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over targets, in fp32 (survey eq. 16, first term).

    Args:
        logits: (..., vocabulary), any floating dtype; `logits[..., :]` predicts `targets[...]`, already shifted.
        targets: (...) token ids, or `IGNORED`.

    Raises:
        ValueError: logits and targets are not of the same positions.
    """
    return ResponseObjective(divergences=())(logits, None, targets)[0]


def kl_sum(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) in nats, summed over positions that have a target, in fp32.

    Zero, with zero gradient, where student and teacher agree (survey eq. 15-16; Hinton et al. 2015, section 2).

    Args:
        student: (..., vocabulary) logits with gradient.
        teacher: (..., vocabulary) logits without.
        targets: (...) token ids; positions with `IGNORED` do not count.
        temperature: T > 0.

    Raises:
        ValueError: the two vocabularies differ.
    """
    return ResponseObjective(0.0, (Divergence(temperature=temperature),))(student, teacher, targets)[0]


__all__ = ["IGNORED", "Divergence", "ResponseObjective", "cross_entropy_sum", "kl_sum"]

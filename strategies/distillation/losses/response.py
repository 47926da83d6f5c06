"""Response distillation: cross-entropy with the text and divergences from the teacher, as sums over target tokens.

Losses are sums, not means: only the caller knows the number of target tokens over all micro-batches and ranks to
divide by. If given hidden states and output heads in place of logits, logits exist for one tile of positions at a time;
see `strategies.distillation.losses.tiled_loss`.
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
        label_smoothing: share of the target's probability that is spread evenly over the student's vocabulary, in
            [0, 1).
        z_loss: weight of the squared log of the softmax normalizer Z.

    Raises:
        ValueError: a number is out of range, every weight is zero, or a divergence is given twice.
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
        """Whether any divergence has a weight, so that teacher targets are required."""
        return any(one.weight for one in self.divergences)

    @property
    def terms(self) -> Terms:
        """The weighted terms, which are evaluated on blocks of logits."""
        return Terms(self.cross_entropy, self.label_smoothing, self.z_loss, self.divergences)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor | Targets | None, targets: torch.Tensor, *,
                 head: Head | None = None, common: SharedVocabulary | None = None, asked: torch.Tensor | None = None,
                 tile: int | None = None, accumulate: torch.dtype = torch.float32, learned: torch.Tensor | None = None
                 ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted loss, and each term unweighted and detached, in `accumulate`, summed over target tokens.

        Gradients flow to the student's hidden states, and to the weight and bias of its head, and to nothing else.

        Args:
            student: (..., width) hidden states that enter `head`, or (..., vocabulary) logits if there is no `head`.
                Position i predicts `targets[i]`: the targets are already shifted.
            teacher: its logits (..., vocabulary), `HiddenTargets` with its head, or the compact `SampledTargets` or
                `TopTargets`; None if no divergence has a weight.
            targets: (...) token ids, or `IGNORED`.
            head: the student's; under autocast its products are computed in the autocast dtype and summed in fp32.
            common: the tokens that both models have, where their vocabularies differ; divergences are taken over these
                alone.
            asked: (...) True where there are teacher targets; None for all positions.
            tile: bytes of logits that may exist at a time; None for the device's default, which costs no speed.
            accumulate: dtype of intermediate results. Use float64 if student and teacher are so close, or logits so
                large, that products of hidden states and head are not precise enough in fp32.
            learned: (n,) flat positions that have a target, if known; finding them synchronizes with a GPU.

        Raises:
            ValueError: shapes, vocabularies or temperatures do not match.
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
    """The same targets with all positions flattened into one dimension."""
    return replace(teacher_targets, **{field.name: getattr(teacher_targets, field.name).flatten(0, dimensions - 1)
                              for field in fields(teacher_targets) if field.name not in ("temperature", "head")})


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over targets, in fp32 (survey eq. 16, first term).

    Args:
        logits: (..., vocabulary), any floating dtype; `logits[..., :]` predicts `targets[...]`, already shifted.
        targets: (...) token ids, or `IGNORED`.

    Raises:
        ValueError: logits and targets do not have the same positions.
    """
    return ResponseObjective(divergences=())(logits, None, targets)[0]


def kl_sum(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) in nats, summed over positions that have a target, in fp32.

    It is zero, with zero gradient, where student and teacher agree (survey eq. 15-16; Hinton et al. 2015, section 2).

    Args:
        student: (..., vocabulary) logits with gradient.
        teacher: (..., vocabulary) logits without.
        targets: (...) token ids; positions with `IGNORED` are left out.
        temperature: T > 0.

    Raises:
        ValueError: the two vocabularies differ.
    """
    return ResponseObjective(0.0, (Divergence(temperature=temperature),))(student, teacher, targets)[0]


__all__ = ["IGNORED", "Divergence", "ResponseObjective", "cross_entropy_sum", "kl_sum"]

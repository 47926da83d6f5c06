"""Response distillation: cross-entropy with the text and KL to the teacher, as sums over target tokens.

Sums, not means: the caller divides by the true number of tokens over micro-batches and processes, which no single
micro-batch knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

CHUNK = 16 * 2**20  # bytes of fp32 logits worked on at a time, small enough to stay near a processor's caches
IGNORED = -100  # target of a position that is not learnt: prompt, padding, last token of a document


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over targets, in fp32.

    Args:
        logits: (..., vocabulary), any floating dtype; `logits[..., :]` predicts `targets[...]`, already shifted.
        targets: (...) token ids, or `IGNORED`.

    Raises:
        ValueError: logits and targets are not of the same positions.

    Source: survey eq. 16, first term.
    """
    if logits.shape[:-1] != targets.shape:
        shapes = tuple(logits.shape), tuple(targets.shape)
        raise ValueError(f"logits of shape {shapes[0]} cannot predict targets of shape {shapes[1]}")
    return functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def kl_sum(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) in nats, summed over positions that have a target, in fp32.

    T^2 keeps its gradient on the scale of the cross-entropy's whatever the temperature (Hinton et al. 2015,
    section 2). Zero, with zero gradient, where student and teacher agree.

    Args:
        student: (..., vocabulary) logits with gradient.
        teacher: (..., vocabulary) logits without.
        targets: (...) token ids; positions with `IGNORED` do not count.
        temperature: T > 0.

    Raises:
        ValueError: the two vocabularies differ.

    Source: survey eq. 15 (softened probabilities) and eq. 16, second term.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student and teacher logits are over {student.shape[-1]} and {teacher.shape[-1]} tokens")
    kept = _learnt(targets.flatten())
    return _SoftenedKL.apply(student.flatten(0, -2), teacher.flatten(0, -2), kept, temperature)


def _learnt(targets: torch.Tensor) -> torch.Tensor:
    """Positions that have a target; all of them, which needs the most memory, where a step is only planned."""
    if isinstance(targets, FakeTensor):
        return torch.arange(targets.numel(), device=targets.device)
    return torch.argwhere(targets != IGNORED)[:, 0]


class _SoftenedKL(torch.autograd.Function):
    """T^2 KL(p || q) with p, q the softened teacher and student, exact also where they nearly agree.

    With d = log p - log q, sum p d loses its digits when d is small: large terms of both signs cancel. Since both
    sum to one, sum p d = sum p (d + exp(-d) - 1), where no term is negative. The gradient with respect to the
    student's logits is T (q - p), which is all that is kept for backward, one fp32 number per logit; everything else
    lives for `CHUNK` bytes at a time.
    """

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, temperature: float
                ) -> torch.Tensor:
        gradient = torch.zeros(student.shape, dtype=torch.float32, device=student.device)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for rows in kept.split(max(1, CHUNK // (4 * student.shape[-1]))):
            log_q = functional.log_softmax(student[rows].float() / temperature, dim=-1)
            log_p = functional.log_softmax(teacher[rows].float() / temperature, dim=-1)
            p, d = log_p.exp(), log_p - log_q
            q_minus_p = torch.where(d.abs() < 1, p * torch.expm1(-d.clamp(-1, 1)), log_q.exp() - p)
            total += (p * d + q_minus_p).sum()
            gradient[rows] = q_minus_p
        ctx.save_for_backward(gradient)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return temperature**2 * total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream * ctx.temperature * gradient).to(ctx.dtype), None, None, None


@dataclass(frozen=True)
class ResponseObjective:
    """`cross_entropy * CE + kl * T^2 KL`, with both weights exactly as given (survey eq. 16; Hinton et al. 2015)."""

    cross_entropy: float = 1.0
    kl: float = 1.0
    temperature: float = 2.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to be asked at all."""
        return self.kl > 0

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted loss, and each term unweighted and detached, all summed over target tokens.

        Args:
            student: (batch, sequence, vocabulary) logits.
            teacher: the same of the teacher, or None when `kl` is zero.
            targets: (batch, sequence) next tokens, or `IGNORED`.
        """
        loss = student.new_zeros((), dtype=torch.float32)
        terms: dict[str, torch.Tensor] = {}
        if self.cross_entropy:
            terms["cross_entropy"] = cross_entropy_sum(student, targets)
            loss = loss + self.cross_entropy * terms["cross_entropy"]
        if self.kl:
            assert teacher is not None, "a KL term needs the teacher's logits"
            terms["kl"] = kl_sum(student, teacher, targets, self.temperature)
            loss = loss + self.kl * terms["kl"]
        return loss, {name: term.detach() for name, term in terms.items()}

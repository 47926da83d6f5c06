"""Distillation losses by their definitions, in float64, and small cases to take them of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from strategies.distillation.losses.divergences import NAMES, Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets

NEAR = 0.01  # distance of a student's hidden states from its teacher's
WHOLE = [name for name in NAMES if name != "uld"]  # the divergences between distributions over the same tokens
SHARES = {"jsd": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}


@dataclass
class Case:
    """Hidden states (positions, width) and heads of student and teacher, and targets."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    teacher_targets: torch.Tensor
    their_weight: torch.Tensor
    their_bias: torch.Tensor
    targets: torch.Tensor

    def student_logits(self) -> torch.Tensor:
        """In float64."""
        return self.hidden.double() @ self.weight.double().T + self.bias.double()

    def teacher_logits(self) -> torch.Tensor:
        """In float64."""
        return self.teacher_targets.double() @ self.their_weight.double().T + self.their_bias.double()

    def split(self, at: int) -> list[Case]:
        """The positions before and after `at`."""
        heads = self.weight, self.bias
        return [Case(self.hidden[part], *heads, self.teacher_targets[part], self.their_weight, self.their_bias,
                     self.targets[part]) for part in (slice(0, at), slice(at, None))]


def case(spread: float, distance: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
         positions: int = 21, width: int = 24, vocabulary: int = 50) -> Case:
    """Logits of a standard deviation; with a `distance` one head for both, and hidden states so far from each other."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    hidden, weight = random(positions, width).to(dtype), (spread / width**0.5 * random(vocabulary, width)).to(dtype)
    bias = (0.1 * spread * random(vocabulary)).to(dtype)
    if distance is None:
        theirs = (random(positions, width).to(dtype), (spread / width**0.5 * random(vocabulary, width)).to(dtype),
                  (0.1 * spread * random(vocabulary)).to(dtype))
    else:
        theirs = ((hidden + distance * random(positions, width)).to(dtype), weight, bias)
    targets = torch.randint(0, vocabulary, (positions,), generator=make)
    targets[::6] = IGNORED
    return Case(hidden, weight, bias, *theirs, targets)


def definition(name: str, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor,
               temperature: float = 1.0, share: float | None = None) -> torch.Tensor:
    """T^2 times a divergence, or the cross-entropy, summed over positions with a target, written out."""
    kept = targets != IGNORED
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(student[kept], targets[kept], reduction="sum")
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    s = SHARES.get(name) if share is None else share

    def mixture(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(first + math.log(s), second + math.log(1 - s))

    rows = {"forward_kl": lambda: p * (log_p - log_q), "reverse_kl": lambda: q * (log_q - log_p),
            "jsd": lambda: (s * p * (log_p - mixture(log_p, log_q))
                            + (1 - s) * q * (log_q - mixture(log_p, log_q))),
            "skewed_kl": lambda: p * (log_p - mixture(log_p, log_q)),
            "skewed_reverse_kl": lambda: q * (log_q - mixture(log_q, log_p)),
            "total_variation": lambda: 0.5 * (p - q).abs()}[name]()
    return temperature**2 * rows.sum(-1)[kept].sum()


def results(name: str, one: Case, exact: bool = False, **options: object) -> tuple[torch.Tensor, ...]:
    """A loss and its gradients by hidden states, weight and bias: by the engine, or by definition in float64."""
    mine = [tensor.double() if exact else tensor.clone() for tensor in (one.hidden, one.weight, one.bias)]
    mine = [tensor.requires_grad_() for tensor in mine]
    if exact:
        value = definition(name, mine[0] @ mine[1].T + mine[2], one.teacher_logits(), one.targets)
    else:
        text = name == "cross_entropy"
        objective = ResponseObjective(float(text), () if text else (Divergence(name),))
        teacher = None if text else HiddenTargets(one.teacher_targets, Head(one.their_weight, one.their_bias))
        value = objective(mine[0], teacher, one.targets, head=Head(mine[1], mine[2]), **options)[0]
    value.backward()
    return value.detach(), *(tensor.grad for tensor in mine)


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    size = float(wanted.double().norm())
    return float((ours.double() - wanted.double()).norm()) / size if size else float(ours.double().norm())

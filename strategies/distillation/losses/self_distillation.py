"""Self-distillation: exits after some blocks of a student learn from the targets and from the student's own last layer.

Source: Teerapittayanon et al. 2016, BranchyNet, section III-B (the weighted sum over exits); Zhang et al. 2019, *Be
Your Own Teacher*, eq. 2-3 (cross-entropy, and KL from the deepest classifier).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strategies.distillation.losses.divergences import Divergence
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.recorder import Values
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import HiddenTargets, LogitTargets


@dataclass(frozen=True)
class ExitObjective:
    """What exits learn.

    Attributes:
        layers: indices of the blocks after which there is an exit, from the first to the last.
        weight: of all exits together in the loss. Each has a part that is proportional to the number of blocks before
            it, so that early ones, which can do least, bend the student least.
        cross_entropy: share of the cross-entropy with the targets, in [0, 1]; the rest is KL from the last layer.

    Raises:
        ValueError: a number is out of range.
    """

    layers: tuple[int, ...]
    weight: float = 1.0
    cross_entropy: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is from zero on, not {self.weight}")
        if not 0 <= self.cross_entropy <= 1:
            raise ValueError(f"cross_entropy is a share in [0, 1], not {self.cross_entropy}")

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of each exit in the loss of all; they sum to 1."""
        depths = [layer + 1 for layer in self.layers]
        return tuple(depth / sum(depths) for depth in depths)

    @property
    def response(self) -> ResponseObjective:
        """The loss of one exit; nothing of it moves the last layer, which is its teacher."""
        return ResponseObjective(self.cross_entropy, (
            Divergence("forward_kl", 1 - self.cross_entropy, temperature=1.0),))


class ExitTerms:
    """Records hidden states of a student while it runs, and computes the loss of its exits.

    Args:
        student: without wrappers.
        name: the student's submodule with the exits, each under the number of its block. An exit of a language model is
            called with hidden states and gives those that enter the student's own head; of a classifier with hidden
            states and the mask of its tokens, and gives logits.
        objective: what they learn.

    Raises:
        ValueError: a layer is out of range.
    """

    def __init__(self, student: nn.Module, name: str, objective: ExitObjective) -> None:
        self.student, self.name, self.objective = student, name, objective
        self.recorder = Values(student, objective.layers, ["hidden"])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager in which to run the student and take `sum`; on exit the recorded tensors are dropped."""
        with self.recorder:
            try:
                yield
            finally:
                self.recorder.clear()

    def sum(self, last: torch.Tensor, head: Head | None, targets: torch.Tensor, inputs: Mapping[str, Any],
            tile: int | None = None, learned: torch.Tensor | None = None) -> torch.Tensor:
        """The unweighted loss of all exits, summed over target tokens, after the student has run.

        Args:
            last: (..., width) hidden states that enter the student's head; its logits if there is no `head`.
            head: the student's; logits exist for one tile of positions at a time.
            targets: (...) tokens or classes, or `IGNORED`.
            inputs: arguments of the student; `attention_mask` says which tokens of a classifier are no padding.
            tile, learned: see `ResponseObjective`.
        """
        exits, objective, own = getattr(self.student, self.name), self.objective.response, last.detach()
        teacher: HiddenTargets | LogitTargets = LogitTargets(own) if head is None else \
            HiddenTargets(own, head.detached())
        total = torch.zeros((), device=last.device)
        for layer, share in zip(self.objective.layers, self.objective.shares, strict=True):
            hidden, module = self.recorder.of(layer, "hidden"), exits[str(layer)]
            found = module(hidden, inputs.get("attention_mask")) if head is None else module(hidden)
            total = total + share * objective(found, teacher if objective.needs_teacher else None, targets, head=head,
                                              tile=tile, learned=learned)[0]
        return total

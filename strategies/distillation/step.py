"""One micro-batch of distillation: the teacher asked, the student called through whatever wraps it, one loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from strategies.distillation.fused import LogitShape, at_head, hidden_states, with_head
from strategies.distillation.heads import Head
from strategies.distillation.response import ResponseObjective
from strategies.distillation.targets import Common, HiddenTargets, LogitTargets, Targets


class Distillation:
    """The loss of a student, with or without a teacher, without the logits of either.

        distillation = Distillation(objective, student, teacher)
        total, terms = distillation(wrapped_student, {"input_ids": ids}, targets)
        (total / tokens).backward()

    Args:
        objective: the terms of the loss.
        student: without wrappers.
        teacher: frozen and in evaluation mode; None where it is not asked, or what it says is given with each call.
        shapes: what student and teacher do to their logits; see `logit_shape`. None for one whose head is not known:
            its logits are made.
        common: the tokens both have, where the vocabularies differ.
        tile: bytes of logits that may exist at a time; None for the device's usual.
    """

    def __init__(self, objective: ResponseObjective, student: nn.Module, teacher: nn.Module | None = None, *,
                 shapes: tuple[LogitShape | None, LogitShape | None] = (LogitShape(), LogitShape()),
                 common: Common | None = None, tile: int | None = None) -> None:
        self.objective, self.student, self.shapes, self.common, self.tile = objective, student, shapes, common, tile
        self.teacher = teacher if objective.needs_teacher else None

    def __call__(self, called: nn.Module, inputs: Mapping[str, Any], targets: torch.Tensor,
                 taught: Targets | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted loss and its terms, summed over target tokens; see `ResponseObjective`.

        Args:
            called: the student as training calls it, wrapped or not.
            inputs: for the forward of student and teacher.
            targets: (batch, sequence) next tokens, or `IGNORED`.
            taught: what the teacher says, where it is not asked itself.
        """
        mine, theirs = self.shapes
        hidden = None
        if self.teacher is not None and taught is None:
            if theirs is None:
                with torch.no_grad():
                    taught = LogitTargets(self.teacher(**inputs).logits)
            else:
                hidden = hidden_states(self.teacher, inputs)[0]

        def take(student: torch.Tensor, head: Head | None, _: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            def loss(of: Targets | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                return self.objective(student, of, targets, head=head, common=self.common, tile=self.tile)

            if hidden is None:
                return loss(taught)
            return with_head(self.teacher, theirs, lambda its: loss(HiddenTargets(hidden, its)))

        if mine is None:
            return take(called(**inputs).logits, None, None)
        with at_head(self.student, take, mine):
            return called(**inputs)

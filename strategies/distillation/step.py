"""The distillation loss of one micro-batch: run the teacher, call the student through its wrappers, sum the terms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from strategies.distillation.live_teacher import LiveTeacher, Said, always
from strategies.distillation.losses.fused_head import LogitShape, at_head
from strategies.distillation.losses.heads import Head
from strategies.distillation.losses.intermediate import IntermediateTerms
from strategies.distillation.losses.load_balancing import balancing_loss
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.self_distillation import ExitTerms
from strategies.distillation.losses.teacher_targets import SharedVocabulary, Targets
from strategies.distillation.losses.tiled_loss import IGNORED
from strategies.distillation.several_teachers import OtherTeacher, shared_out
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter
from strategies.memory.meter import mark


class Distillation:
    """The training loss of a student, with or without a teacher, computed without the full logits of either.

        distillation = Distillation(objective, student, teacher)
        total, terms = distillation(wrapped_student, {"input_ids": ids}, targets)
        (total / tokens).backward()

    Args:
        objective: the terms of the loss.
        student: without wrappers.
        teacher: frozen and in evaluation mode; None if no term needs it or its targets are passed with each call.
        shapes: scale and soft cap that student and teacher apply to their logits; see `logit_shape`. None for a model
            whose head is not supported: its full logits are then computed.
        common: the tokens that both models have, where their vocabularies differ.
        tile: bytes of logits that may exist at a time; None for the device's default.
        intermediate: losses between tensors inside the two models, such as hidden states.
        reader: how the teacher reads the student's text.
        balancing: weight of the load-balancing loss of a mixture of experts; None leaves `output_router_logits` out of
            the student's arguments.
        others: further teachers, each with a share of the divergences; the first has what is left of 1.
        present: context manager within which the first teacher is on the device; see `LiveTeacher`.
        exits: the losses of exits after some of the student's blocks.
    """

    def __init__(
        self,
        objective: ResponseObjective,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        shapes: tuple[LogitShape | None, LogitShape | None] = (LogitShape(), LogitShape()),
        common: SharedVocabulary | None = None,
        tile: int | None = None,
        intermediate: IntermediateTerms | None = None,
        reader: TeacherInputAdapter = identity_adapter,
        balancing: float | None = None,
        others: Sequence[OtherTeacher] = (),
        present: Callable[..., Any] = always,
        exits: ExitTerms | None = None,
    ) -> None:
        self.others, self.present, self.exits = tuple(others), present, exits
        self.objective, self.student, self.shapes, self.common, self.tile = objective, student, shapes, common, tile
        self.reader, self.balancing = reader, balancing
        self.teacher, self.intermediate = (
            teacher if objective.needs_teacher or intermediate is not None else None,
            intermediate,
        )

    def planned(self) -> Distillation:
        """A copy for planning with fake tensors, which hold no text to read: the teacher gets the student's tokens."""
        alike = copy.copy(self)
        alike.reader = identity_adapter
        alike.others = tuple(replace(one, reader=identity_adapter) for one in self.others)
        return alike

    def without_text(self) -> Distillation:
        """A copy for sequences that the student generated: only terms with the teacher count, none with the text."""
        judged = copy.copy(self)
        judged.objective = replace(self.objective, cross_entropy=0.0, z_loss=0.0)
        return judged

    @property
    def _is_taught(self) -> bool:
        """Whether a term needs the teacher now; weights may move during a run, and be zero for a part of it."""
        return self.objective.needs_teacher or self.intermediate is not None

    def __call__(self, called: nn.Module, inputs: Mapping[str, Any], targets: torch.Tensor,
                 teacher_targets: Targets | None = None, real: torch.Tensor | None = None,
                 learned: torch.Tensor | None = None, others_targets: Sequence[Targets] | None = None
                 ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the weighted loss and its terms, summed over target tokens; see `ResponseObjective`.

        The load-balancing loss is by definition a mean over the tokens of one call. Here it is multiplied by the call's
        number of target tokens, so that dividing by all target tokens gives the mean over calls, weighted by their
        target tokens. With a single call, the whole loss is then that of transformers. If a batch is split into
        several calls, each of them is balanced by itself.

        Args:
            called: the student as the training loop calls it, wrapped or not.
            inputs: arguments of the forward of student and teacher.
            targets: (batch, sequence) next tokens, or `IGNORED`.
            teacher_targets: the teacher's targets; None to run the teacher.
            real: (batch, sequence) True where a token is not padding, for the load-balancing loss; None for all.
            learned: (n,) flat positions that have a target, if known; finding them synchronizes with a GPU.
            others_targets: the targets of the other teachers; None to run them.
        """
        with (nullcontext() if self.intermediate is None else self.intermediate.recording(),
              nullcontext() if self.exits is None else self.exits.recording()):
            return self._loss(called, inputs, targets, teacher_targets, real, learned, others_targets)

    def _loss(
        self,
        called: nn.Module,
        inputs: Mapping[str, Any],
        targets: torch.Tensor,
        teacher_targets: Targets | None,
        real: torch.Tensor | None,
        learned: torch.Tensor | None,
        others_targets: Sequence[Targets] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mine, theirs = self.shapes
        if self.intermediate is not None and self.intermediate.maps is not None:
            inputs = {**inputs, "output_attentions": True}
        first = Said(teacher_targets)
        if self._is_taught and self.teacher is not None and teacher_targets is None:
            first = LiveTeacher(self.teacher, theirs, self.reader, self.present)(inputs, targets)
        others = self.others if self.objective.needs_teacher else ()
        said = [first, *([one.live(inputs, targets) for one in others if one.live is not None]
                         if others_targets is None else map(Said, others_targets))]
        objectives = shared_out(self.objective, others)

        def take(student: torch.Tensor, head: Head | None, output: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            def judged(number: int, common: SharedVocabulary | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                return said[number].judge(lambda of, asked: objectives[number](
                    student, of, targets, head=head, common=common, asked=asked, tile=self.tile, learned=learned))

            mark("loss")
            total, terms = judged(0, self.common)
            for number, one in enumerate(others, 1):
                more, apart = judged(number, one.common)
                total = total + more
                terms |= {f"{name}_{number + 1}": value for name, value in apart.items()}
            if self.intermediate is not None:
                for name, weight, value in self.intermediate.sums(targets, inputs, (output, first.output)):
                    total, terms[name] = total + weight * value, value.detach()
            if self.exits is not None:
                value = self.exits.sum(student, head, targets, inputs, self.tile, learned)
                total, terms["early_exits"] = total + self.exits.objective.weight * value, value.detach()
            if self.balancing:
                value = balancing_loss(self.student, output, real) * (targets != IGNORED).sum()
                total, terms["balancing"] = total + self.balancing * value, value.detach()
            return total, terms

        if self.balancing is not None:
            inputs = {**inputs, "output_router_logits": self.balancing > 0}
        if mine is None:
            output = called(**inputs)
            return take(output.logits, None, output)
        with at_head(self.student, take, mine):
            return called(**inputs)

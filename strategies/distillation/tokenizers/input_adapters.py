"""Adapters that turn a student's batch into its teacher's, where their tokenizers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from strategies.distillation.tokenizers.span_alignment import SpanAligner


@dataclass(frozen=True)
class TeacherInput:
    """A batch in the teacher's tokens.

    Attributes:
        inputs: arguments of the teacher's forward.
        student_at, teacher_at: (pairs,) positions in the flattened batches of both that follow the same text; None if
            the positions of both are the same.
    """

    inputs: Mapping[str, Any]
    student_at: torch.Tensor | None = None
    teacher_at: torch.Tensor | None = None

    def placed(self, said: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Move teacher outputs (batch, teacher's sequence, width) to student positions, and return which have one.

        Args:
            targets: (batch, sequence) of the student.
        """
        if self.student_at is None:
            return said, None
        placed = said.new_zeros(targets.numel(), said.shape[-1])
        placed[self.student_at] = said.flatten(0, 1)[self.teacher_at]
        asked = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
        asked[self.student_at] = True
        return placed.view(*targets.shape, -1), asked.view(targets.shape)


TeacherInputAdapter = Callable[[Mapping[str, Any], torch.Tensor], TeacherInput]


def identity_adapter(inputs: Mapping[str, Any], targets: torch.Tensor) -> TeacherInput:
    """For a teacher with the student's token ids: its inputs are the student's."""
    return TeacherInput(inputs)


class TokenIdRemap:
    """For a teacher with the same token strings under other ids.

    Args:
        to_teacher: (student's vocabulary,) the teacher's id of each token, or -1, as from `align`.
    """

    def __init__(self, to_teacher: torch.Tensor) -> None:
        self.to_teacher = to_teacher

    def __call__(self, inputs: Mapping[str, Any], targets: torch.Tensor) -> TeacherInput:
        """Map the ids of a batch.

        Raises:
            ValueError: the teacher does not have one of the tokens.
        """
        ids = self.to_teacher.to(inputs["input_ids"].device)[inputs["input_ids"]]
        if (ids < 0).any():
            raise ValueError(f"the teacher has no token for the student's {int(inputs['input_ids'][ids < 0][0])}")
        return TeacherInput({**inputs, "input_ids": ids})


class SpanAlignedInputs:
    """For a teacher with another tokenizer: the text is tokenized again, and compared where tokens of both end."""

    def __init__(self, aligner: SpanAligner) -> None:
        self.aligner = aligner

    def __call__(self, inputs: Mapping[str, Any], targets: torch.Tensor) -> TeacherInput:
        """Align a batch, whose inputs must have `input_ids` and `position_ids`."""
        device, length = targets.device, targets.shape[1]
        given = inputs["input_ids"].cpu(), inputs["position_ids"].cpu(), targets.cpu()
        rows = [self.aligner(*row) for row in zip(*given, strict=True)]
        longest = max(1, *(int(row.teacher_at.max()) + 1 if len(row.teacher_at) else 1 for row in rows))
        ids, positions = (torch.stack([getattr(row, name)[:longest] for row in rows]).to(device)
                          for name in ("input_ids", "position_ids"))
        at = [torch.cat([getattr(row, name) + number * stride for number, row in enumerate(rows)]).to(device)
              for name, stride in (("student_at", length), ("teacher_at", longest))]
        return TeacherInput({**inputs, "input_ids": ids, "position_ids": positions}, *at)

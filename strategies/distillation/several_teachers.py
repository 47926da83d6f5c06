"""Several teachers of one student: each is compared with the student by a divergence of its own, as in You et al. 2017.

    sum over teachers k of  share_k D(teacher_k, student),  with shares that sum to 1

For forward KL the gradient is that of the divergence from the mixture of the teachers (the two differ by a constant);
for others it is not. The sum is taken, since then each teacher can have a vocabulary of its own, and only one of them
has to be on the device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from strategies.distillation.live_teacher import LiveTeacher, always
from strategies.distillation.losses.fused_head import LogitShape
from strategies.distillation.losses.response import ResponseObjective
from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter


@dataclass(frozen=True)
class OtherTeacher:
    """A teacher beside the first one.

    Attributes:
        share: of the divergence, between 0 and 1.
        model: frozen and in evaluation mode; None if its targets are passed with each call.
        shape: scale and soft cap of its logits; see `LiveTeacher`.
        common: the tokens that it and the student both have, where their vocabularies differ.
        reader: how it reads the student's text.
        present: context manager within which the model is on the device; see `LiveTeacher`.
    """

    share: float
    model: nn.Module | None = None
    shape: LogitShape | None = None
    common: SharedVocabulary | None = None
    reader: TeacherInputAdapter = identity_adapter
    present: Callable[..., Any] = always

    @property
    def live(self) -> LiveTeacher | None:
        """The teacher that is asked at every step; None if its targets are passed."""
        return None if self.model is None else LiveTeacher(self.model, self.shape, self.reader, self.present)


def shared_out(objective: ResponseObjective, others: Sequence[OtherTeacher]) -> list[ResponseObjective]:
    """The objective of the first teacher, with all terms on the text, and of each other, with its divergences alone."""
    if not others:
        return [objective]
    parts = [_with_share(objective, 1 - sum(one.share for one in others))]
    return parts + [replace(_with_share(objective, one.share), cross_entropy=0.0, z_loss=0.0, label_smoothing=0.0)
                    for one in others]


def _with_share(objective: ResponseObjective, share: float) -> ResponseObjective:
    return replace(objective, divergences=tuple(replace(one, weight=one.weight * share)
                                                for one in objective.divergences))

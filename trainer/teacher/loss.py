"""The loss of a micro-batch, shared by the training loop and the memory planner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from strategies.distillation.losses.teacher_targets import Targets
from strategies.distillation.step import Distillation
from trainer.data.batches import Batch, model_inputs, real_tokens
from trainer.experiment.precision import MixedPrecision


def loss_of_batch(distillation: Distillation, precision: MixedPrecision, student: nn.Module, batch: Batch,
                  engine_casts: bool = False, teacher_targets: Targets | None = None,
                  others_targets: Sequence[Targets] | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted loss of a micro-batch and its terms, summed over target tokens.

    The memory planner runs this function too, so that it plans what is trained.

    Args:
        engine_casts: whether the engine casts to the compute dtype, so that no autocast is needed.
        teacher_targets: the teacher's targets from a cache; None with a live teacher, or without one.
        others_targets: the same of the other teachers.
    """
    with precision.autocast(engine_casts):
        return distillation(student, model_inputs(batch), batch["targets"], teacher_targets, real_tokens(batch),
                            batch.get("learned"), others_targets)

"""The loss of a micro-batch, as the loop takes it and as the plan of memory does."""

from __future__ import annotations

import torch
from torch import nn

from strategies.distillation.losses.teacher_targets import Targets
from strategies.distillation.step import Distillation
from trainer.data.batches import Batch, model_inputs, real_tokens
from trainer.experiment.precision import MixedPrecision


def loss_of_batch(distillation: Distillation, precision: MixedPrecision, student: nn.Module, batch: Batch,
                  engine_casts: bool = False, teacher_targets: Targets | None = None
                  ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted loss and its terms for a micro-batch, summed over target tokens; the plan of memory runs this too."""
    with precision.autocast(engine_casts):
        return distillation(student, model_inputs(batch), batch["targets"], teacher_targets, real_tokens(batch),
                            batch.get("learned"))

"""Prepares the loss on hidden states on the first rows of a run: the teacher's variances, and fitted projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from strategies.distillation.losses.feature_start import fit_projections, teacher_variances
from strategies.distillation.losses.features import NAME
from trainer.data.batches import model_inputs
from trainer.experiment.objective_nodes import Objective
from trainer.models.layer_widths import layer_widths

ROWS = 32  # that variances and projections are taken from


def start_features(objective: Objective, rows: Callable[[int], dict[str, torch.Tensor]], micro_batch: int,
                   student: nn.Module, teacher: nn.Module | None) -> dict[int, float] | None:
    """Fit the student's projections where the objective asks for it, and return variances of the teacher's layers.

    To be called before the student is wrapped or sharded. A run that resumes gets its projections from the checkpoint
    afterwards; the variances are the same again, since they follow from the teacher and the rows.

    Args:
        rows: gives as many of the first rows of the run.
        micro_batch: rows of a forward.

    Returns:
        variances by teacher layer; None where the loss does not divide by them.
    """
    features = objective.features
    if teacher is None or features is None or (features.scale, features.projections) == ("none", "random"):
        return None
    pairs = objective.pairs("features", len(layer_widths(student.config)), len(layer_widths(teacher.config)))
    batches = list(_batches(rows(ROWS), micro_batch))
    if features.projections == "least_squares" and hasattr(student, NAME):
        was = student.training
        fit_projections(student.eval(), teacher, getattr(student, NAME), pairs, batches)
        student.train(was)
    return teacher_variances(teacher, {layer for _, layer in pairs}, batches) if features.scale == "variance" else None


def _batches(rows: dict[str, torch.Tensor], size: int) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Arguments of a forward, and its targets, for micro-batches of rows."""
    for begin in range(0, len(rows["targets"]), size):
        part = {name: tensor[begin:begin + size] for name, tensor in rows.items()}
        yield model_inputs(part), part["targets"]

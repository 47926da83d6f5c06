"""Disk space for checkpoints: how much they need and how much is free."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.common.frozen_base import base_names
from trainer.checkpoints.finding import latest, listed
from trainer.distributed.rank_memory import RankSetup, step_bytes
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.models.build import empty_student
from trainer.run.metrics import readable
from trainer.teacher.exit_losses import attach_parts

MOMENTS_8BIT = 8  # bytes saved per element for its two 8-bit moments, which are dequantized to fp32


def planned_bytes(experiment: Experiment, student: PretrainedConfig, teacher: PretrainedConfig | None) -> int:
    """Bytes of a checkpoint's tensors over all processes: fp32 weights, no frozen base's, and optimizer state."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = empty_student(experiment.form, student)
        attach_parts(experiment.objective, experiment.seed, model, teacher)
        base = base_names(model)
        weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in base)
        sparsity = experiment.student.sparsity
        scores = 0 if sparsity is None else sparsity.bytes_in_training(model)[1]
        if experiment.optimizer.name == "adamw8bit":
            return (4 + MOMENTS_8BIT) * weights + scores
        setup = RankSetup.of(experiment, Topology()).sharding_setup(model, on_gpu=False)
        state, _ = step_bytes(experiment.optimizer, model, setup)
    return 4 * weights + state + scores


def check_space(folder: Path, planned: int, *, keep: int, written: int, best: bool = False) -> None:
    """Check, before training, that a run's checkpoints will fit on their disk.

    Args:
        folder: the run's `checkpoints` folder, which need not exist.
        planned: predicted bytes of a checkpoint; if there is one already, its actual size counts instead.
        keep: number of checkpoints that are kept; while a new one is written there is one more.
        written: number of checkpoints that the whole run writes.
        best: whether one more is kept, that of the best evaluation.

    Raises:
        UserError: the checkpoints do not fit.
    """
    there = listed(folder)
    newest = latest(folder)
    one = planned if newest is None else _held(newest)
    count, free = min(keep + 1 + best, written), free_bytes(folder)
    needed = count * one - sum(map(_held, there[-count:]))
    if needed <= free:
        return
    kept = "" if keep == 1 else f", or set training.keep_checkpoints=1 (now {keep})"
    raise UserError("run.folder", f"its checkpoints do not fit: {count} of {readable(one)} at a time take "
                    f"{readable(needed)} more, and {readable(free)} are free there", value=str(folder.parent),
                    way_out=f"make room, choose a run.folder with room{kept}")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _held(checkpoint: Path) -> int:
    return sum(file.lstat().st_size for file in checkpoint.iterdir()) if checkpoint.is_dir() else 0

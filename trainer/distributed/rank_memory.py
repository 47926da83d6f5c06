"""What each process holds of an experiment's models: the experiment's own words turned into bytes by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from strategies.memory.residency import Residency
from strategies.memory.tracker import tensors_of
from strategies.optimizers.transient import Sharing, gathers_updates, transient_bytes
from strategies.rematerialization.capture.fake_tensors import FakeItemMode
from strategies.sharding.gather_units import sharing_blocks
from strategies.sharding.rank_residency import SHARDED, ShardingSetup, residency, stand_ins
from strategies.sharding.zero import EVEN, bucket_numel
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.precision import DTYPES


def accumulates(experiment: Experiment, processes: int) -> bool:
    """Whether a micro-batch begins with the gradients of another one."""
    return experiment.training.batch_size > experiment.training.micro_batch * processes


def gradients_stay(experiment: Experiment, processes: int) -> bool:
    """Whether gradients exist when a micro-batch begins: of an earlier one, or because they lie in DDP's buckets."""
    return accumulates(experiment, processes) or experiment.sharding.named(processes) == "ddp"


def in_backward(experiment: Experiment) -> Callable[[torch.optim.Optimizer], Any] | None:
    """What makes an optimizer step during backward, where that is asked for."""
    if not experiment.optimizer.in_backward:
        return None
    from strategies.optimizers.in_backward import StepInBackward

    return StepInBackward


def is_sharded(experiment: Experiment, processes: int) -> bool:
    """Whether a process holds parts of weights, so that planning needs to know of the others."""
    return experiment.sharding.named(processes) in SHARDED


def check_blocks(experiment: Experiment, **models: nn.Module | None) -> None:
    """Raise `UserError` where blocks that are gathered one after another have weights in common (Zamba's do)."""
    for key, model in models.items():
        if model is not None and (pair := sharing_blocks(model)) is not None:
            raise UserError("sharding.engine", f"{pair[0]} and {pair[1]} of the {key} have weights in common, and "
                            f"{experiment.sharding.engine} gathers block by block", value=experiment.sharding.engine,
                            way_out="leave it out: each process then holds the whole model")


def bucket_for(experiment: Experiment, fitting: int) -> int:
    """Elements of ZeRO's communication bucket: as many as are asked for, or else those of a `fitting` one."""
    if experiment.sharding.bucket is None:
        return fitting
    return experiment.sharding.bucket_bytes // DTYPES[experiment.precision.dtype].itemsize // EVEN * EVEN


def gathered_dtype(experiment: Experiment, teacher: nn.Module) -> torch.dtype | None:
    """Dtype in which a sharded teacher's weights are gathered, if another than their own."""
    compute = DTYPES[experiment.precision.dtype]
    return None if compute in (torch.float32, next(teacher.parameters()).dtype) else compute


def setup_for(experiment: Experiment, student: nn.Module, processes: int, on_gpu: bool) -> ShardingSetup:
    """How the student is shared out; `on_gpu` if the device is another than the CPU that things are offloaded to."""
    sharding, fitting = experiment.sharding, bucket_numel(student)
    return ShardingSetup(engine=sharding.named(processes), ranks=processes, stage=sharding.zero_stage,
                 compute=DTYPES[experiment.precision.dtype], bucket=bucket_for(experiment, fitting),
                 accumulates=accumulates(experiment, processes), ahead=fitting if on_gpu else 0,
                 offload_parameters=sharding.offload.parameters and on_gpu,
                 offload_optimizer=sharding.offload.optimizer and on_gpu, gloo=not on_gpu,
                 in_backward=experiment.optimizer.in_backward)


def residency_for(experiment: Experiment, student: nn.Module, teacher: nn.Module | None, processes: int,
                  on_gpu: bool) -> Residency:
    """What the first process holds; both models are tensors without data, in a mode for such, which is entered."""
    setup = setup_for(experiment, student, processes, on_gpu)
    optimizer = experiment.optimizer.build(student)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state, update = optimizer_bytes(optimizer, setup)
    return residency(student, groups, setup, optimizer_state=state, update=update, teacher=teacher,
                     teacher_compute=None if teacher is None else gathered_dtype(experiment, teacher))


def optimizer_bytes(optimizer: torch.optim.Optimizer, setup: ShardingSetup) -> tuple[int, int]:
    """Bytes of an optimizer's state for a rank's part, and most that come and go in its step, taken without data.

    The optimizer's parameters are replaced by the rank's.
    """
    largest = max(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    for group, parts in zip(optimizer.param_groups, stand_ins(
            optimizer.param_groups, setup, known=not gathers_updates(optimizer)), strict=True):
        group["params"] = parts
    parts = [part for group in optimizer.param_groups for part in group["params"]]
    for part in parts:
        part.grad = torch.empty_like(part)
    with FakeItemMode():
        optimizer.step()
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(optimizer.state))
        return state, transient_bytes(optimizer, Sharing(setup.ranks, largest, on_cpu=setup.gloo))

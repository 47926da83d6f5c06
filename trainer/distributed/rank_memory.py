"""Resident memory per rank: translate an experiment's sharding and optimizer settings into bytes on each rank."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from strategies.common.running_statistics import batch_norms
from strategies.memory.residency import Residency
from strategies.memory.tracker import tensors_of
from strategies.optimizers.transient import Sharing, gathers_updates, one_of_each, transient_bytes
from strategies.rematerialization.capture.fake_tensors import FakeItemMode
from strategies.sharding.gather_units import sharing_blocks
from strategies.sharding.rank_residency import SHARDED, ShardingSetup, residency, stand_ins
from strategies.sharding.zero import EVEN, bucket_numel
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Optimizer, Sharding, Training
from trainer.experiment.precision import DTYPES

REMEMBERED = 64  # most optimizers whose bytes a process keeps
_found: OrderedDict[tuple[Any, ...], tuple[int, int]] = OrderedDict()


@dataclass(frozen=True)
class RankSetup:
    """Settings that determine how a model is sharded over the ranks of a topology, and when its gradients exist.

    Attributes:
        sharding: engine, stage and offload.
        training: batch sizes and gradient clipping.
        optimizer: the optimizer and its hyperparameters.
        compute: dtype of forward and backward.
        topology: degrees of parallelism and device.
    """

    sharding: Sharding
    training: Training
    optimizer: Optimizer
    compute: torch.dtype
    topology: Topology

    @classmethod
    def of(cls, experiment: Experiment, topology: Topology) -> RankSetup:
        """The setup of an experiment."""
        return cls(experiment.sharding, experiment.training, experiment.optimizer, DTYPES[experiment.precision.dtype],
                   topology)

    @property
    def engine(self) -> str:
        """Name of the engine: the one configured, or the default for this number of processes."""
        return self.sharding.named(self.topology.ranks)

    @property
    def is_sharded(self) -> bool:
        """Whether the engine is FSDP2 or ZeRO, so that planning has to account for the other ranks."""
        return self.engine in SHARDED

    @property
    def changes_frozen(self) -> bool:
        """Whether the engine holds a frozen base in other numbers, or shares it out, and keeps no copy of it."""
        return self.engine == "zero" and (self.sharding.zero_stage == 3 or self.compute is not torch.float32)

    @property
    def accumulates(self) -> bool:
        """Whether gradients are accumulated over several micro-batches per step."""
        return self.training.batch_size > self.training.micro_batch * self.topology.data_parallel

    @property
    def gradients_stay(self) -> bool:
        """Whether gradient memory exists when a micro-batch begins: accumulated, or held in DDP's buckets."""
        return self.accumulates or self.engine == "ddp"

    @property
    def in_backward(self) -> Callable[[torch.optim.Optimizer], Any] | None:
        """The class that runs the optimizer step during backward, or None without `optimizer.in_backward`."""
        if not self.optimizer.in_backward:
            return None
        from strategies.optimizers.in_backward import StepInBackward

        return StepInBackward

    def check_blocks(self, **models: nn.Module | None) -> None:
        """Raise `UserError` if blocks of a model share weights, as Zamba's do: weights are all-gathered per block."""
        for key, model in models.items():
            if model is not None and (pair := sharing_blocks(model)) is not None:
                raise UserError("sharding.engine", f"{pair[0]} and {pair[1]} of the {key} have weights in common, and "
                                f"{self.sharding.engine} gathers block by block", value=self.sharding.engine,
                                way_out="leave it out: each process then holds the whole model")

    def bucket(self, fitting: int) -> int:
        """Size of ZeRO's communication bucket in elements: `sharding.bucket` if set, otherwise `fitting`."""
        if self.sharding.bucket is None:
            return fitting
        return self.sharding.bucket_bytes // self.compute.itemsize // EVEN * EVEN

    def gathered_dtype(self, teacher: nn.Module) -> torch.dtype | None:
        """Dtype in which a sharded teacher's weights are all-gathered, or None for their own dtype.

        Running statistics are gathered by no one, and a batch norm takes them in the dtype of its weights only.
        """
        own = self.compute in (torch.float32, next(teacher.parameters()).dtype) or batch_norms(teacher)
        return None if own else self.compute

    def sharding_setup(self, student: nn.Module, on_gpu: bool) -> ShardingSetup:
        """The sharding setup of the student; `on_gpu` is false if the device is the CPU, the offload target itself."""
        sharding, fitting = self.sharding, bucket_numel(student)
        return ShardingSetup(
            engine=self.engine, ranks=self.topology.data_parallel, stage=sharding.zero_stage, compute=self.compute,
            bucket=self.bucket(fitting), accumulates=self.accumulates, ahead=fitting if on_gpu else 0,
            offload_parameters=sharding.offload.parameters and on_gpu,
            offload_optimizer=sharding.offload.optimizer and on_gpu, gloo=not on_gpu,
            in_backward=self.optimizer.in_backward)

    def residency(self, student: nn.Module, teacher: nn.Module | None, on_gpu: bool) -> Residency:
        """Resident memory of rank 0; the models hold fake tensors, and the caller has entered the fake-tensor mode."""
        setup = self.sharding_setup(student, on_gpu)
        groups = [list(group["params"]) for group in self.optimizer.build(student).param_groups]
        state, update = step_bytes(self.optimizer, student, setup)
        return residency(student, groups, setup, optimizer_state=state, update=update, teacher=teacher,
                         teacher_compute=None if teacher is None else self.gathered_dtype(teacher))


def step_bytes(settings: Optimizer, model: nn.Module, setup: ShardingSetup) -> tuple[int, int]:
    """`optimizer_bytes` of the optimizer that an experiment has for a model.

    Planning asks several times for the same model, and gets what was found the first time.
    """
    shapes = tuple((name, parameter.shape, parameter.dtype, parameter.device.type, parameter.requires_grad)
                   for name, parameter in model.named_parameters())
    key = settings.model_dump_json(), setup, type(model), shapes
    if key not in _found:
        _found[key] = optimizer_bytes(settings.build(model), setup)
        if len(_found) > REMEMBERED:
            _found.popitem(last=False)
    return _found[key]


def optimizer_bytes(optimizer: torch.optim.Optimizer, setup: ShardingSetup) -> tuple[int, int]:
    """(state, transient) bytes of an optimizer on one rank, from a step on fake tensors.

    The first is its state for the rank's shard, the second the peak of temporary memory in its step. The optimizer's
    parameters are replaced by those of the rank.
    """
    largest = max(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    for group, parts in zip(optimizer.param_groups, stand_ins(
            optimizer.param_groups, setup, known=not gathers_updates(optimizer)), strict=True):
        group["params"] = parts
    parts = [part for group in optimizer.param_groups for part in group["params"]]
    for part in parts:
        part.grad = torch.empty_like(part)
    with FakeItemMode():
        _begin(optimizer)
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(optimizer.state))
        return state, transient_bytes(optimizer, Sharing(setup.ranks, largest, on_cpu=setup.gloo))


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Give all parameters the state that they have after a step, which is taken by one of each kind alone."""
    with one_of_each(optimizer) as kinds:
        optimizer.step()
    for first, *others in kinds:
        for part in others:
            optimizer.state[part] = tree_map_only(torch.Tensor, torch.empty_like, optimizer.state[first])

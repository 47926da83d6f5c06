"""Fully sharded data parallelism with torch's `fully_shard`, FSDP2 (Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.common.shards import Layout, dtensor_layout
from strategies.sharding.engine import Sharded
from strategies.sharding.gather_units import units_of


def shard(model: nn.Module, mesh: DeviceMesh, *, compute: torch.dtype | None = None, reshard: bool = True,
          offload: bool = False, frozen: bool = False) -> None:
    """Shard a model in place: each block is all-gathered when it runs and, with `reshard`, resharded right after.

    The tail (last norm and output head) stays gathered between forward and backward, because the backward begins with
    it; a frozen model has no backward and reshards it too.

    Args:
        model: the model.
        mesh: one-dimensional, over all ranks.
        compute: dtype in which weights are gathered and modules run; gradients are then reduced and kept in fp32. None
            uses the weights' own dtype.
        reshard: whether blocks are resharded after their forward.
        offload: keep weights, gradients and optimizer state on the CPU.
        frozen: the model is only used for inference, never trained.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    pin = torch.cuda.is_available()
    settings = {"mesh": mesh, "mp_policy": policy,
                "offload_policy": CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()}
    units = units_of(model)
    for name in units.blocks:
        fully_shard(model.get_submodule(name), reshard_after_forward=reshard, **settings)
    if units.first is not None:
        fully_shard(model.get_submodule(units.first), reshard_after_forward=reshard, **settings)
        tail = [model.get_submodule(name) for name in units.tail]
        for part in tail if frozen else [tail]:  # a frozen head is called separately, after the rest
            fully_shard(part, reshard_after_forward=frozen, **settings)
    fully_shard(model, reshard_after_forward=frozen, **settings)
    check_sharded(model, mesh)


def check_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    """Assert that a model really is sharded, because several ways of requesting it silently do nothing."""
    assert isinstance(model, FSDPModule), "the model is not an FSDPModule"
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is whole on every rank"
        assert parameter.device_mesh.size() == dist.get_world_size(), f"{name} is sharded over other ranks than all"
    whole = sum(parameter.numel() for parameter in model.parameters())
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    rows = sum(parameter.numel() // max(1, parameter.shape[0]) for parameter in model.parameters() if parameter.ndim)
    assert own <= whole // mesh.size() + rows + len(list(model.parameters())), "a rank holds more than its part"


def rank_mesh(device: str) -> DeviceMesh:
    """A one-dimensional device mesh of all ranks."""
    return init_device_mesh(device, (dist.get_world_size(),))


class FSDP2(Sharded):
    """A student sharded by `fully_shard`."""

    def __init__(self, student: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], *,
                 device: torch.device, compute: torch.dtype | None = None, reshard: bool = True,
                 offload: bool = False) -> None:
        mesh = rank_mesh(device.type)
        shard(student, mesh, compute=compute, reshard=reshard, offload=offload)
        if not offload:
            student.to(device)  # buffers; weights are there already
        self.casts, self.group, self.device = compute is not None, mesh.get_group(), device
        super().__init__(student, student, make_optimizer(student))

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See `Engine`; between micro-batches gradients stay sharded, so they are reduced over ranks in each."""
        self.student.set_is_last_backward(last)
        yield

    def tensors(self) -> Iterator[tuple[torch.Tensor, Layout]]:
        """See `Engine`."""
        for module in self.student.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the tail gathered
        for name, parameter in self.student.named_parameters():
            yield parameter, dtensor_layout(parameter, name)

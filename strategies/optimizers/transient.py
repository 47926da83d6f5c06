"""Temporary memory of an optimizer step: declared by each optimizer here, traced for torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from strategies.common.shards import layout_of
from strategies.memory.tracker import LiveBytes


@dataclass(frozen=True)
class Sharing:
    """How the parameters of an optimizer are sharded.

    Attributes:
        ranks: number of ranks that share each parameter; 1 if parameters are whole.
        largest: number of elements of the largest whole parameter.
        on_cpu: whether the step runs on the CPU.
    """

    ranks: int = 1
    largest: int = 0
    on_cpu: bool = True


@runtime_checkable
class DeclaresTransient(Protocol):
    """An optimizer that declares the temporary memory of its step.

    Attributes:
        gathers_updates: whether it gathers the whole update of one parameter at a time, whatever part a rank holds.
    """

    gathers_updates: bool

    def transient_bytes(self, sharing: Sharing) -> int:
        """Peak temporary bytes of a step of the parts it has now, whose gradients exist."""


def transient_bytes(optimizer: torch.optim.Optimizer, sharing: Sharing) -> int:
    """What an optimizer declares or, for torch's own, which declare nothing, what a traced step takes."""
    return optimizer.transient_bytes(sharing) if isinstance(optimizer, DeclaresTransient) else traced(optimizer)


def gathers_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer gathers whole updates, one at a time."""
    return isinstance(optimizer, DeclaresTransient) and optimizer.gathers_updates


@contextmanager
def one_of_each(optimizer: torch.optim.Optimizer) -> Iterator[list[list[torch.Tensor]]]:
    """Within the context the optimizer has one tensor of each shape, dtype and layout in each of its groups.

    An optimizer that updates one tensor after another does with these all that it does with the others.

    Yields:
        the tensors of each kind, the one that is there first.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    kinds: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for number, parameters in enumerate(groups):
        for tensor in parameters:
            kinds.setdefault((number, tensor.shape, tensor.dtype, layout_of(tensor)), []).append(tensor)
    try:
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [same[0] for kind, same in kinds.items() if kind[0] == number]
        yield list(kinds.values())
    finally:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters


def traced_one_by_one(optimizer: torch.optim.Optimizer) -> int:
    """`traced` of an optimizer that updates one tensor after another and keeps nothing from one to the next."""
    with one_of_each(optimizer):
        return traced(optimizer)


def traced(optimizer: torch.optim.Optimizer) -> int:
    """Peak temporary bytes of a step, which is taken; the optimizer's state has to exist.

    On fake tensors nothing is computed. Memory inside kernels is not seen.
    """
    with LiveBytes() as tracker:
        optimizer.step()
    return tracker.peak

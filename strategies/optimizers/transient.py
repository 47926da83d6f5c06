"""Temporary memory of an optimizer step: declared by each optimizer here, traced for torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

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


def traced(optimizer: torch.optim.Optimizer) -> int:
    """Peak temporary bytes of a step, which is taken; the optimizer's state has to exist.

    On fake tensors nothing is computed. Memory inside kernels is not seen.
    """
    with LiveBytes() as tracker:
        optimizer.step()
    return tracker.peak

"""What comes and goes in an optimizer's step: each optimizer says it of itself, and torch's own are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from strategies.memory.tracker import LiveBytes


@dataclass(frozen=True)
class Sharing:
    """How the parameters of an optimizer are shared out.

    Attributes:
        ranks: among which each is; 1 where they are whole.
        largest: elements of the largest whole parameter.
        on_cpu: whether the step runs on the CPU.
    """

    ranks: int = 1
    largest: int = 0
    on_cpu: bool = True


@runtime_checkable
class DeclaresTransient(Protocol):
    """An optimizer that says what its step needs for a moment.

    Attributes:
        gathers_updates: whether it gathers the whole update of one parameter at a time, whatever part a rank holds.
    """

    gathers_updates: bool

    def transient_bytes(self, sharing: Sharing) -> int:
        """Most bytes that come and go in a step of the parts that it has now, whose gradients exist."""


def transient_bytes(optimizer: torch.optim.Optimizer, sharing: Sharing) -> int:
    """What an optimizer declares; of one of torch's own, whose steps are all there is to see, what a step takes."""
    return optimizer.transient_bytes(sharing) if isinstance(optimizer, DeclaresTransient) else traced(optimizer)


def gathers_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer gathers whole updates, one at a time."""
    return isinstance(optimizer, DeclaresTransient) and optimizer.gathers_updates


def traced(optimizer: torch.optim.Optimizer) -> int:
    """Most bytes that come and go in a step that is taken here and now; its state has to exist.

    On tensors without data nothing is computed. What a kernel takes inside itself is not seen.
    """
    with LiveBytes() as tracker:
        optimizer.step()
    return tracker.peak

"""The processes of a run as one of them sees them: sums, placement, agreement, and the watch over all of them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trainer.distributed import signals
from trainer.distributed.topology import Topology
from trainer.distributed.watchdog import Watch


class RankGroup:
    """What parts of a run ask of its processes.

    Attributes:
        topology: degrees of parallelism.
        index: number of this process; `main` is the first one.
        device: what this process computes on.
        watch: tells the others where this one is.
    """

    def __init__(self, accelerator: Accelerator, topology: Topology, timeout: float) -> None:
        self.accelerator, self.topology = accelerator, topology
        self.index, self.main = accelerator.process_index, accelerator.is_main_process
        self.device = accelerator.device
        self.watch = Watch(self.index, topology.ranks, timeout)

    @property
    def replica(self) -> int:
        """Which share of the rows this process reads."""
        return self.topology.data_rank(self.index)

    @property
    def wide(self) -> torch.dtype:
        """The widest floating dtype of the device; Apple's GPUs lack float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def at(self, words: str) -> None:
        """Say where this process is going to be: before it waits for others, or for anything that may not come."""
        self.watch.at(words)

    def place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on this process's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, reduction="sum")

    def read_totals(self, *values: torch.Tensor | float) -> list[float]:
        """Sums over processes of some numbers, by one reduction, as Python numbers: the device is waited for once."""
        every = [value.to(self.device, self.wide) if isinstance(value, torch.Tensor) else
                 torch.full((), value, dtype=self.wide, device=self.device) for value in values]
        return self.total(torch.stack(every)).tolist()

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Tensors of all processes, end to end."""
        return self.accelerator.gather(value)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Lists of all processes, end to end."""
        return gather_object(values)

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to; all take part, and come to the same answer."""
        own = signals.asked() is not None
        return own if self.topology.ranks == 1 else bool(self.read_totals(float(own))[0])

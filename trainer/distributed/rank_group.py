"""The processes of a run as seen from one of them: collectives, device placement, and hang detection."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trainer.distributed import signals
from trainer.distributed.topology import Topology
from trainer.distributed.watchdog import Watch


class RankGroup:
    """Collectives and placement for one process of a run.

    Attributes:
        topology: degrees of parallelism.
        index: rank of this process.
        main: whether this is the main process, rank 0.
        device: device of this process.
        watch: tells the other processes where this one is, to detect hangs.
    """

    def __init__(self, accelerator: Accelerator, topology: Topology, timeout: float) -> None:
        self.accelerator, self.topology = accelerator, topology
        self.index, self.main = accelerator.process_index, accelerator.is_main_process
        self.device = accelerator.device
        self.watch = Watch(self.index, topology.ranks, timeout)

    @property
    def replica(self) -> int:
        """Data-parallel rank of this process, which determines the rows it reads."""
        return self.topology.data_rank(self.index)

    @property
    def wide(self) -> torch.dtype:
        """The widest floating-point dtype of the device; Apple's GPUs lack float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def at(self, words: str) -> None:
        """Announce the place this process is about to reach; call before anything that may wait forever."""
        self.watch.at(words)

    def place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to this process's device, without blocking."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes (all-reduce)."""
        return self.accelerator.reduce(value, reduction="sum")

    def read_totals(self, *values: torch.Tensor | float) -> list[float]:
        """Sum several numbers over all processes, as Python floats, with a single all-reduce and device sync."""
        every = [value.to(self.device, self.wide) if isinstance(value, torch.Tensor) else
                 torch.full((), value, dtype=self.wide, device=self.device) for value in values]
        return self.total(torch.stack(every)).tolist()

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes (all-gather)."""
        return self.accelerator.gather(value)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Concatenate the lists of all processes."""
        return gather_object(values)

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; a collective call with the same result on all processes."""
        own = signals.asked() is not None
        return own if self.topology.ranks == 1 else bool(self.read_totals(float(own))[0])

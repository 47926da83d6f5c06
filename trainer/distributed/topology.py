"""How the processes of a run share its work: degrees of parallelism, ranks and devices, each by its own name."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from trainer.errors import UserError

NOT_YET = ("tensor", "pipeline", "context")


@dataclass(frozen=True)
class Topology:
    """Degrees of parallelism. Only `data_parallel` can be more than 1 today; the others have their places here.

    Attributes:
        data_parallel: replicas (or shards of one) that read different rows. Gradients are averaged over them, a batch
            is shared out among them, and sharding engines cut weights, gradients and optimizer state by it.
        device: kind of device that every rank computes on, "cpu" or "cuda", or the name of a GPU to plan for.
        tensor: ranks that share each matrix product.
        pipeline: ranks that hold consecutive blocks.
        context: ranks that share each sequence.

    Raises:
        UserError: a degree that is not 1 where that is all there is.
    """

    data_parallel: int = 1
    device: str = "cpu"
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in NOT_YET:
            if getattr(self, name) != 1:
                raise UserError("", f"{name} parallelism is not supported: its degree is 1", value=getattr(self, name),
                                way_out="use more data-parallel processes, sharded by sharding.engine fsdp2 or zero")

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return prod((self.data_parallel, *(getattr(self, name) for name in NOT_YET)))

    @property
    def devices(self) -> int:
        """Devices that the run computes on: one for each rank; ranks on CPU share the cores of their machine."""
        return self.ranks

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on a GPU, or are planned for one."""
        return self.device != "cpu"

    def data_rank(self, rank: int) -> int:
        """Which of the data-parallel replicas a rank belongs to: ranks of one replica are neighbors."""
        return rank // (self.ranks // self.data_parallel)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for `plan.json`."""
        return {**asdict(self), "ranks": self.ranks, "devices": self.devices}

    @classmethod
    def launched(cls, device: str = "cpu") -> Topology:
        """Of the processes that a launcher started, as its environment variables tell before they have joined."""
        return cls(data_parallel=int(os.environ.get("WORLD_SIZE", 1)), device=device)

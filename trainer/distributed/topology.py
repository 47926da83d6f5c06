"""The topology of a run: degrees of parallelism, number of ranks, and device."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from trainer.errors import UserError

NOT_YET = ("tensor", "pipeline", "context")


@dataclass(frozen=True)
class Topology:
    """Degrees of parallelism; only `data_parallel` can be more than 1 today, the others are placeholders.

    Attributes:
        data_parallel: number of data-parallel ranks, which read different rows: replicas, or shards of one. A batch is
            split among them and gradients are averaged over them; sharding engines divide weights, gradients and
            optimizer state by it.
        device: device type of every rank, "cpu" or "cuda", or the name of a GPU to plan for.
        tensor: ranks that share each matrix product.
        pipeline: ranks that hold consecutive blocks.
        context: ranks that share each sequence.

    Raises:
        UserError: an unsupported degree is not 1.
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
        """Number of processes."""
        return prod((self.data_parallel, *(getattr(self, name) for name in NOT_YET)))

    @property
    def devices(self) -> int:
        """Number of devices, one per rank; ranks on CPU share the cores of their machine."""
        return self.ranks

    @property
    def on_gpu(self) -> bool:
        """Whether ranks run on a GPU, or are planned for one."""
        return self.device != "cpu"

    def data_rank(self, rank: int) -> int:
        """Data-parallel rank of a global rank; ranks of one replica are consecutive."""
        return rank // (self.ranks // self.data_parallel)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `plan.json`."""
        return {**asdict(self), "ranks": self.ranks, "devices": self.devices}

    @classmethod
    def launched(cls, device: str = "cpu") -> Topology:
        """The topology given by the launcher's environment variables, before the processes have joined."""
        return cls(data_parallel=int(os.environ.get("WORLD_SIZE", 1)), device=device)

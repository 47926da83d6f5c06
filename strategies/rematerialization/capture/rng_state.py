"""State of the global random number generators that a model may draw from: torch, Python and NumPy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from strategies.rematerialization.capture.compile_region import gpus_in_use


@dataclass(frozen=True, eq=False)
class Generators:
    """States of the generators of the CPU, the current GPU (None if CUDA is not in use), Python and NumPy."""

    cpu: torch.Tensor
    gpu: torch.Tensor | None
    python: tuple
    numpy: tuple

    @classmethod
    def now(cls) -> Generators:
        """The current states."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if gpus_in_use() else None, random.getstate(),
                   np.random.get_state())

    def put_back(self) -> None:
        """Restore these states."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def equals(self, other: Generators | None) -> bool:
        """Whether the same numbers would be drawn."""
        if other is None or (self.gpu is None) != (other.gpu is None):
            return False
        return (torch.equal(self.cpu, other.cpu) and (self.gpu is None or torch.equal(self.gpu, other.gpu))
                and self.python == other.python
                and all(np.array_equal(mine, its) for mine, its in zip(self.numpy, other.numpy, strict=True)))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore all generators afterwards."""
    before = Generators.now()
    try:
        yield
    finally:
        before.put_back()

"""The learning-rate schedule, a pure function of the optimizer step.

It therefore does not depend on the number of processes, and resuming it needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then cosine (Loshchilov & Hutter 2017), linear, WSD (Hu et al. 2024) or constant.

    Attributes:
        peak: learning rate after warm-up.
        steps: optimizer steps of the run.
        shape: shape after warm-up.
        warmup: fraction of the run when below 1, number of steps otherwise.
        decay: fraction of the run over which `wsd` decays.
        final: learning rate reached after the last step, as a fraction of the peak: no step is taken at zero.
        restarts: steps after which all of it begins anew, as in SGDR (Loshchilov & Hutter 2017): each stretch up to the
            next restart, or to the end, has its own warm-up and decay.
    """

    peak: float
    steps: int
    shape: str = "cosine"
    warmup: float = 0.0
    decay: float = 0.2
    final: float = 0.0
    restarts: tuple[int, ...] = ()

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up in optimizer steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if self.restarts:
            begin, end = self.stretch(step)
            return replace(self, steps=end - begin, restarts=())(step - begin)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.peak * (self.final + (1 - self.final) * self._height(progress, step))

    def stretch(self, step: int) -> tuple[int, int]:
        """The steps (begin, end) between the restarts around a step; the end is not in it."""
        return (max((one for one in self.restarts if one <= step), default=0),
                min((one for one in self.restarts if step < one < self.steps), default=self.steps))

    def _height(self, progress: float, step: int) -> float:
        """Normalized height above `final`: 1 right after warm-up, 0 at the end."""
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "linear":
            return 1 - progress
        if self.shape == "wsd":
            start = self.steps - round(self.decay * self.steps)
            return (self.steps - step) / max(1, self.steps - start) if step >= start else 1.0
        return 1.0

"""Mixed precision: half-precision forward and backward, fp32 weights and updates (Micikevicius et al. 2018).

This does not use Accelerate's `mixed_precision`, which silently runs fp16 as fp32 on CPU, nor torch's `GradScaler`,
which inspects only the local gradients: with sharded gradients, ranks could decide differently. Here the overflow check
uses the norm of the whole gradient, which every rank has. The same code runs on CPU and GPU, so that what the tests
show on one holds on the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # at this scale a non-finite gradient is not due to loss scaling: the gradient itself is at fault
BACKOFF, GROWTH = 0.5, 2.0


class MixedPrecision:
    """Autocast for the forward pass and, for fp16, a dynamic loss scale (survey eq. 24; Micikevicius et al. 2018, 3.2).

    Attributes:
        dtype: dtype of matrix products.
        loss_scale: factor on the loss before backward; 1 except in fp16.
        skipped: number of steps skipped because the gradient overflowed at the current scale.
        growths: number of times the scale was doubled.
    """

    def __init__(self, name: str, device_type: str, *, initial_scale: float = 65536.0, growth_interval: int = 2000):
        self.name, self.device_type, self.dtype = name, device_type, DTYPES[name]
        self.skipped = self.growths = 0
        self.loss_scale = initial_scale if name == "fp16" else 1.0
        self.growth_interval = growth_interval
        self._good = 0  # steps without overflow since the scale last changed

    def autocast(self, engine_casts: bool = False) -> AbstractContextManager:
        """Autocast context for a forward pass; a no-op if the engine itself runs the model in half precision."""
        return torch.autocast(self.device_type, dtype=self.dtype if self.name != "fp32" else None,
                              enabled=self.name != "fp32" and not engine_casts)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply the loss by the loss scale."""
        return loss * self.loss_scale if self.name == "fp16" else loss

    def overflowed(self, loss_finite: bool, gradient_finite: bool) -> bool:
        """Whether a non-finite gradient only means that the loss scale is too large."""
        return self.name == "fp16" and loss_finite and not gradient_finite and self.loss_scale > SMALLEST_SCALE

    def settle(self, overflow: bool, finite: bool) -> None:
        """Update the loss scale after a step: halve it if not finite, double it every `growth_interval` good steps."""
        self.skipped += overflow
        if self.name != "fp16":
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.loss_scale *= BACKOFF
        elif self._good == self.growth_interval:
            self.loss_scale *= GROWTH
            self.growths += 1
            self._good = 0

    def follow(self, loss_scale: float, overflow: bool) -> None:
        """Record a step of an engine that scales the loss itself: its loss scale, and whether it overflowed."""
        self.skipped += overflow
        self.growths += loss_scale > self.loss_scale
        self.loss_scale = loss_scale

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {"loss_scale": self.loss_scale, "good": self._good, "skipped": self.skipped, "growths": self.growths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`."""
        self.loss_scale, self._good = state["loss_scale"], state["good"]
        self.skipped, self.growths = state["skipped"], state["growths"]

"""Mixed precision: half-precision forward and backward, fp32 weights and updates (Micikevicius et al. 2018).

Ours rather than Accelerate's `mixed_precision`, because that is silently fp32 for fp16 on CPU, and rather than torch's
`GradScaler`, which looks at a rank's own gradients: where they are sharded, ranks could decide differently. Here a step
is judged by the norm of the whole gradient, which every rank has. The same code runs on CPU and GPU, so what the tests
show on one holds on the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # an overflow below this is no overflow of the scale: the gradient itself is not finite
BACKOFF, GROWTH = 0.5, 2.0


class MixedPrecision:
    """Autocast for the forward pass and, for fp16, a dynamic loss scale (survey eq. 24; Micikevicius et al. 2018, 3.2).

    Attributes:
        dtype: dtype of matrix products.
        loss_scale: what the loss is multiplied by before backward; 1 except in fp16.
        skipped: steps skipped because of an overflow at the current scale.
        growths: times the scale was doubled.
    """

    def __init__(self, name: str, device_type: str, *, initial_scale: float = 65536.0, growth_interval: int = 2000):
        self.name, self.device_type, self.dtype = name, device_type, DTYPES[name]
        self.skipped = self.growths = 0
        self.loss_scale = initial_scale if name == "fp16" else 1.0
        self.growth_interval = growth_interval
        self._good = 0  # steps without overflow since the scale last moved

    def autocast(self, engine_casts: bool = False) -> AbstractContextManager:
        """Context of a forward pass; it does nothing where an engine runs the model in half precision by itself."""
        return torch.autocast(self.device_type, dtype=self.dtype if self.name != "fp32" else None,
                              enabled=self.name != "fp32" and not engine_casts)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Loss times the loss scale."""
        return loss * self.loss_scale if self.name == "fp16" else loss

    def overflowed(self, loss_finite: bool, gradient_finite: bool) -> bool:
        """Whether a non-finite gradient only means that the loss scale was too large."""
        return self.name == "fp16" and loss_finite and not gradient_finite and self.loss_scale > SMALLEST_SCALE

    def settle(self, overflow: bool, finite: bool) -> None:
        """Move the loss scale after a step: halve it for a gradient that is not finite, double it after a while."""
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
        """Take over what an engine that scales by itself did in a step."""
        self.skipped += overflow
        self.growths += loss_scale > self.loss_scale
        self.loss_scale = loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Numbers that a resumed run needs."""
        return {"loss_scale": self.loss_scale, "good": self._good, "skipped": self.skipped, "growths": self.growths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.loss_scale, self._good = state["loss_scale"], state["good"]
        self.skipped, self.growths = state["skipped"], state["growths"]

"""Mixed precision: half-precision forward and backward, fp32 weights and updates (Micikevicius et al. 2018).

Ours rather than Accelerate's `mixed_precision`, because that is silently fp32 for fp16 on CPU. This is the same code
on CPU and GPU, so what the tests show on one holds on the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # an overflow below this is no overflow of the scale: the gradient itself is not finite


class MixedPrecision:
    """Autocast for the forward pass and, for fp16, a dynamic loss scale (survey eq. 24).

    Attributes:
        dtype: dtype of matrix products.
        skipped: steps skipped because of an overflow at the current scale.
        growths: times the scale was doubled.
    """

    def __init__(self, name: str, device_type: str, *, initial_scale: float = 65536.0, growth_interval: int = 2000):
        self.name, self.device_type, self.dtype = name, device_type, DTYPES[name]
        self.skipped = self.growths = 0
        self._scaler = None
        if name == "fp16":
            self._scaler = torch.amp.GradScaler(device_type, init_scale=initial_scale, growth_interval=growth_interval)
            assert self._scaler.is_enabled(), f"fp16 without loss scaling on {device_type} would lose small gradients"

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass."""
        return torch.autocast(self.device_type, dtype=self.dtype if self.name != "fp32" else None,
                              enabled=self.name != "fp32")

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 except in fp16."""
        return self._scaler.get_scale() if self._scaler else 1.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Loss times the loss scale."""
        return self._scaler.scale(loss) if self._scaler else loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale, once per step, before they are measured or clipped."""
        if self._scaler:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool, overflow: bool) -> None:
        """Update the weights if the gradients are finite, and move the loss scale; count an overflow as skipped."""
        if finite:
            optimizer.step()
        if self._scaler:
            before = self.loss_scale
            self._scaler.update()
            self.growths += self.loss_scale > before
            self.skipped += overflow

    def overflowed(self, loss_finite: bool, gradient_finite: bool) -> bool:
        """Whether a non-finite gradient only means that the loss scale was too large."""
        return bool(self._scaler) and loss_finite and not gradient_finite and self.loss_scale > SMALLEST_SCALE

    def state_dict(self) -> dict[str, Any]:
        """Numbers that a resumed run needs."""
        scaler = self._scaler.state_dict() if self._scaler else {}
        return {"scaler": scaler, "skipped": self.skipped, "growths": self.growths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if self._scaler:
            self._scaler.load_state_dict(state["scaler"])
        self.skipped, self.growths = state["skipped"], state["growths"]

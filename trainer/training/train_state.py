"""The state of a training: what a checkpoint remembers beside weights, optimizer and random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.experiment.precision import MixedPrecision


@dataclass
class TrainState:
    """Counters of a run and its loss scale.

    Attributes:
        precision: whose loss scale moves with the steps.
        step: optimizer steps done.
        empty_steps: steps without any target token, ever.
        nonfinite: steps in a row, up to now, whose loss or gradient was not finite.
    """

    precision: MixedPrecision
    step: int = 0
    empty_steps: int = 0
    nonfinite: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data that a resumed run needs."""
        return {"step": self.step, "precision": self.precision.state_dict(), "nonfinite": self.nonfinite,
                "empty_steps": self.empty_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A restart is a new chance for a step that was not finite."""
        self.precision.load_state_dict(state["precision"])
        self.step, self.empty_steps, self.nonfinite = state["step"], state.get("empty_steps", 0), 0

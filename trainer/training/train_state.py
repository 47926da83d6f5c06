"""The training state that a checkpoint stores besides weights, optimizer state and random state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.experiment.precision import MixedPrecision
from trainer.training.best_evaluation import BestEvaluation


@dataclass
class TrainState:
    """The counters of a run, and its loss scale.

    Attributes:
        precision: holds the dynamic loss scale.
        best: the best evaluation so far, if the run keeps its checkpoint; else None.
        step: optimizer steps done.
        rows: rows of the data that these have taken: full batches, except where the run ended within one.
        empty_steps: total number of steps without any target token.
        nonfinite: current number of consecutive steps whose loss or gradient was not finite.
        compiled: whether Inductor runs the planned blocks; None where nothing is planned.
    """

    precision: MixedPrecision
    best: BestEvaluation | None = None
    step: int = 0
    rows: int = 0
    empty_steps: int = 0
    nonfinite: int = 0
    compiled: bool | None = None

    def advance(self, rows: int, end: int | None) -> None:
        """Count a step that took `rows` rows, or fewer if the data of the run ends after `end` rows."""
        self.step += 1
        self.rows += rows if end is None else max(0, min(rows, end - self.rows))

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return {"step": self.step, "rows": self.rows, "precision": self.precision.state_dict(),
                "nonfinite": self.nonfinite, "empty_steps": self.empty_steps,
                **({} if self.compiled is None else {"compiled": self.compiled}),
                **({} if self.best is None else {"best": self.best.state_dict()})}

    def load_state_dict(self, state: dict[str, Any], batch_size: int) -> None:
        """Restore a `state_dict`, except for `nonfinite`, which restarts at 0: a restart is a new chance.

        Args:
            batch_size: rows of a step, for a state that an earlier version wrote without its `rows`.
        """
        self.precision.load_state_dict(state["precision"])
        self.step, self.empty_steps, self.nonfinite = state["step"], state.get("empty_steps", 0), 0
        self.compiled = state.get("compiled")
        self.rows = state.get("rows", self.step * batch_size)
        if self.best is not None and "best" in state:
            self.best.load_state_dict(state["best"])

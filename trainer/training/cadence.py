"""When a run evaluates, when it saves, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.experiment.nodes import Training
from trainer.training.train_state import TrainState


@dataclass(frozen=True)
class Cadence:
    """The points of a run at which something besides training happens; the same on all processes.

    Attributes:
        settings: how often to evaluate and save.
        steps: the planned number of optimizer steps.
        judge_every: steps between evaluations on tasks; None for none in training.
    """

    settings: Training
    steps: int
    judge_every: int | None = None

    def evaluates(self, state: TrainState) -> bool:
        """Whether an evaluation is due after the last step."""
        return state.step == self.steps or (state.step > 0 and state.step % self.settings.evaluate_every == 0)

    def judges(self, state: TrainState) -> bool:
        """Whether an evaluation on tasks is due after the last step."""
        return self.judge_every is not None and (
            state.step == self.steps or (state.step > 0 and state.step % self.judge_every == 0))

    def saves(self, state: TrainState) -> bool:
        """Whether a checkpoint is due after a step and its evaluation, which may be the best so far."""
        best = state.best is not None and state.best.step == state.step
        return best or self.ends(state) or state.step % self.settings.checkpoint_every == 0

    def ends(self, state: TrainState) -> bool:
        """Whether the last step is done, or `training.early_stopping` ends the run here."""
        return state.step >= self.steps or (state.best is not None and state.best.exhausted)

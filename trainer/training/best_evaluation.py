"""The best evaluation of a run so far, and how many evaluations it has waited for a better one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.experiment.evaluate_nodes import LOWER
from trainer.experiment.nodes import Training
from trainer.files import write_atomically
from trainer.run.held_out import FIGURES


@dataclass
class BestEvaluation:
    """Which evaluation on the held-out set had the lowest metric, and when a run stops waiting for a lower one.

    Every process keeps its own and has the same values, since an evaluation's result is the same on all of them.

    Attributes:
        metric: name of the value that is compared, of the held-out text or of a task: `gsm8k.exact_match`.
        steps: planned optimizer steps of the run.
        patience: evaluations in a row without improvement after which training ends; None for never.
        min_delta: by how much a value must be below the last improvement to count as one for `patience`.
        step: steps done at the best evaluation; None before the first finite one.
        value: the metric at the best evaluation.
        reference: the metric at the last improvement by `min_delta`.
        waited: evaluations in a row since then.
        evaluated: steps done at the last evaluation that was taken in.
    """

    metric: str
    steps: int = 0
    patience: int | None = None
    min_delta: float = 0.0
    step: int | None = None
    value: float | None = None
    reference: float | None = None
    waited: int = 0
    evaluated: int = 0

    @classmethod
    def of(cls, settings: Training, steps: int) -> BestEvaluation | None:
        """From the settings of a run; None if the last step is exported whatever evaluations say."""
        return None if settings.keep_best is None else cls(
            settings.keep_best, steps, settings.early_stopping, settings.min_delta or 0.0)

    @property
    def of_task(self) -> bool:
        """Whether the value is of a task, which is not part of every evaluation."""
        return "." in self.metric

    @property
    def higher(self) -> bool:
        """Whether more of the value is better."""
        return self.metric.rpartition(".")[2] not in LOWER if self.of_task else FIGURES[self.metric].higher

    def _shown(self, value: float) -> str:
        return f"{value:.4f}" if self.of_task else FIGURES[self.metric].shown(value)

    @property
    def exhausted(self) -> bool:
        """Whether training is to end, since too many evaluations in a row did not improve."""
        return self.patience is not None and self.waited >= self.patience

    def take_in(self, step: int, found: dict[str, float], counts: bool = True) -> None:
        """Take in an evaluation's result; a value that is not finite is no improvement.

        Args:
            step: optimizer steps done.
            found: the result, with a value for `metric`.
            counts: whether the evaluated student may become the exported one.
        """
        self.evaluated = step
        if not counts:
            return
        value, sign = found[self.metric], -1 if self.higher else 1
        if self.value is None or sign * value < sign * self.value:
            self.step, self.value = (step, value) if abs(value) < float("inf") else (self.step, self.value)
        if sign * value < (float("inf") if self.reference is None else sign * self.reference - self.min_delta):
            self.reference, self.waited = value, 0
        else:
            self.waited += 1

    def outcome(self, exported: int, last: int) -> str:
        """What became of a run, in words: where training ended and why, and which step is exported."""
        waited = f"{self.waited} evaluations in a row were" if self.waited > 1 else "an evaluation was"
        ended = f"trained for {last} of {self.steps} steps, since {waited} no better" if last < self.steps else \
            f"trained for {last} steps"
        task, _, metric = self.metric.rpartition(".")
        what = f"{metric.replace('_', ' ')} of {task}" if task else f"held-out {metric.replace('_', ' ')}"
        best, better = ("highest", "higher") if self.higher else ("lowest", "lower")
        return f"{ended}; the student is that of step {exported}, " + (
            f"with the {best} {what}{':' if task else ' of'} {self._shown(self.value)}" if exported == self.step else
            f"since no checkpoint of a {better} {what} could be kept")

    def record(self, file: Path, exported: int, last: int) -> None:
        """Write the same as JSON, for the report and for later exports."""
        write_atomically(file, json.dumps({
            "metric": self.metric, "value": self.value, "step": exported, "last_step": last,
            "steps": self.steps, "waited": self.waited, "outcome": self.outcome(exported, last)}, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"step": self.step, "value": self.value, "reference": self.reference, "waited": self.waited,
                "evaluated": self.evaluated, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; a run that goes on for longer than it was to waits anew."""
        self.step, self.value, self.reference = state["step"], state["value"], state["reference"]
        self.waited, self.evaluated = state["waited"] if state["steps"] == self.steps else 0, state["evaluated"]

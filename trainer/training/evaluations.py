"""What a run evaluates in training: held-out rows and tasks, each when it is due, recorded, printed, the best kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from trainer.distributed.rank_group import RankGroup
from trainer.experiment.model_nodes import Student
from trainer.files import flatten
from trainer.run.held_out import in_words, main_figure
from trainer.run.metrics import Metrics, ProgressReporter, read_lines
from trainer.run.trackers import Trackers
from trainer.run.working import working
from trainer.training.cadence import Cadence
from trainer.training.evaluation import ClassifierEvaluator, Evaluator
from trainer.training.task_evaluation import TaskEvaluator
from trainer.training.train_state import TrainState

# The kinds of evaluation, by the key of their record in metrics.jsonl.
HELD_OUT, TASKS = "held_out", "tasks"
WORKING = {HELD_OUT: "evaluating", TASKS: "evaluating on tasks"}


class Evaluations:
    """Evaluates a student in training. The results do not depend on the number of processes.

    Args:
        name: of the experiment, for messages.
        steps: of the run.
        student: what an evaluation before its last bit width, or before its last zeros, is not the best of.
        held_out: evaluates on the held-out rows.
        tasks: evaluates on the tasks.
        ranks: the processes of the run.
    """

    def __init__(self, name: str, steps: int, student: Student,
                 held_out: Evaluator | ClassifierEvaluator, tasks: TaskEvaluator, ranks: RankGroup) -> None:
        self.name, self.steps, self.student, self.ranks = name, steps, student, ranks
        self.held_out, self.tasks = held_out, tasks

    def due(self, state: TrainState, cadence: Cadence) -> list[str]:
        """The kinds of evaluation that are due after the last step."""
        return [kind for kind, asked in ((HELD_OUT, cadence.evaluates), (TASKS, cadence.judges)) if asked(state)]

    def interrupted(self, state: TrainState, cadence: Cadence, file: Path) -> list[str]:
        """The kinds that were due when the run was interrupted: after the step was saved, before they were recorded.

        Args:
            file: metrics.jsonl, which the first process reads if any was due.
        """
        best, due, found = state.best, self.due(state, cadence), []
        lines = read_lines(file) if due and self.ranks.main else []
        for kind in due:
            counted = best is None or best.of_task != (kind == TASKS) or best.evaluated == state.step
            done = counted and any(line["step"] == state.step and kind in line for line in lines)
            if not any(self.ranks.gather_objects([done])):
                found.append(kind)
        return found

    def carry_out(self, kind: str, called: nn.Module, state: TrainState, metrics: Metrics, progress: ProgressReporter,
                  trackers: Trackers) -> bool:
        """Evaluate, then record and print the result, and take it in where it may be the best so far.

        Returns False if a process received a stop signal: nothing is recorded then, and the evaluation is done again.

        Args:
            called: the student as training calls it, wrapped or not.
        """
        begun = time.perf_counter()
        with working(self.name, WORKING[kind]):
            found = self.held_out(called, state.step) if kind == HELD_OUT else self.tasks(called)
        if found is None:
            return False
        flat = flatten(found)
        if state.best is not None and state.best.of_task == (kind == TASKS):
            counts = self.student.is_final(state.step - 1, self.steps)
            state.best.take_in(state.step, flat if kind == TASKS else found, counts)
        metrics.write({"step": state.step, kind: found, "seconds": time.perf_counter() - begun})
        trackers.log({f"{kind}/{name}": value for name, value in flat.items()}, state.step)
        progress.say(f"step {state.step}/{self.steps}  "
                     f"{_shown(kind, found, flat, state.best.metric if state.best is not None else None)}")
        return True


def _shown(kind: str, found: dict[str, Any], flat: dict[str, float], best: str | None) -> str:
    """A result for people: all figures of tasks; of held-out rows the main one, and that by which the best is kept."""
    if kind == TASKS:
        return ", ".join(f"{name} {value:.4f}" for name, value in flat.items())
    of_sources = ", ".join(f"{value:.4f} of {name}" for name, value in found.get("sources", {}).items())
    also = [in_words(found, best)] if best in found and best != main_figure(found) else []
    return "; ".join([f"held-out {in_words(found)}" + (f": {of_sources}" if of_sources else ""), *also])

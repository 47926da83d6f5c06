"""Judges one model on one task: outcomes of every record, and the metrics that follow from them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import RunFailed
from trainer.evaluate.asking import Prompter, Reader
from trainer.evaluate.exact_match import answer_outcomes
from trainer.evaluate.intervals import Outcomes, value_of
from trainer.evaluate.likelihood import choice_outcomes, text_outcomes
from trainer.evaluate.task_files import TaskRecords, read_task
from trainer.experiment.evaluate_nodes import Evaluate, Task


@dataclass(frozen=True)
class Judgement:
    """What a model reached on a task.

    Attributes:
        outcomes: metric -> of each record, what was reached of how much.
        written: a few generated answers, with what was found in them.
        known: metric -> value, and low and high if there is an interval, where no outcomes of records are known.
        seconds: how long it took.
    """

    outcomes: dict[str, Outcomes]
    written: list[dict[str, Any]] = field(default_factory=list)
    known: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def values(self) -> dict[str, float]:
        """The value of each metric."""
        return {**{name: value_of(one) for name, one in self.outcomes.items()},
                **{name: one[0] for name, one in self.known.items()}}


def key_of(asked: Evaluate, task: Task) -> str:
    """Key of a task in the experiment, for messages."""
    return f"evaluate.tasks.{asked.tasks.index(task)}"


def read_tasks(asked: Evaluate) -> list[TaskRecords]:
    """The tasks that have files of their own, read and checked.

    Raises:
        UserError: a file or a record of one cannot be used.
    """
    return [read_task(task, key_of(asked, task)) for task in asked.in_training]


def judge(reader: Reader, records: TaskRecords, key: str) -> Judgement | None:
    """Judge a model on a task. A collective call: every process gets the same, as if it was alone.

    Args:
        key: key of the task in the experiment, for messages.

    Returns:
        None if a process received a stop signal: an evaluation is done as a whole, or again.

    Raises:
        RunFailed: processes have read different files.
    """
    began, task = time.perf_counter(), records.task
    reader.ranks.at(f"the records of task {task.name}")
    if len(set(reader.ranks.gather_objects([records.sha256]))) > 1:
        raise RunFailed(f"the processes have read different files from {task.path}\n  -> give every machine the same")
    prompter, written = Prompter(records, reader.tokenizer, key), []
    if task.kind == "perplexity":
        outcomes = text_outcomes(reader, records.questions)
    elif task.kind == "multiple_choice":
        outcomes = choice_outcomes(reader, records.questions, prompter)
    else:
        found = answer_outcomes(reader, task, records.questions, prompter)
        outcomes, written = found or (None, [])
    return None if outcomes is None else Judgement(outcomes, written, seconds=time.perf_counter() - began)

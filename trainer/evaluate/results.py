"""What several models reached on tasks, side by side, as plain data for `evaluation.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluate.intervals import difference, interval, value_of
from trainer.evaluate.judge import Judgement
from trainer.evaluate.task_files import TaskRecords
from trainer.experiment.evaluate_nodes import Task

LIKE = "teacher"  # whom the others are compared with


def compared(tasks: Sequence[Task], records: Sequence[TaskRecords], found: Mapping[str, Mapping[str, Judgement]]
             ) -> dict[str, Any]:
    """The content of `evaluation.json`.

    Args:
        records: of the tasks that have files of their own.
        found: model -> name of a task -> what it reached there.
    """
    own = {one.task.name: one for one in records}
    return {
        "tasks": {task.name: _described(task, own.get(task.name)) for task in tasks},
        "models": {model: {name: _metrics(one) for name, one in tasks_of.items()} for model, tasks_of in found.items()},
        "differences": {model: differences for model, tasks_of in found.items() if model != LIKE and LIKE in found and (
            differences := {name: _differences(one, found[LIKE][name]) for name, one in tasks_of.items()})},
        "records": {model: {name: {metric: _short(outcomes) for metric, outcomes in one.outcomes.items()}
                            for name, one in tasks_of.items()} for model, tasks_of in found.items()},
        "written": {model: {name: one.written for name, one in tasks_of.items() if one.written}
                    for model, tasks_of in found.items()},
        "seconds": {model: {name: one.seconds for name, one in tasks_of.items()} for model, tasks_of in found.items()},
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The content as JSON, with what was reached of each record on one line."""
    parts = {key: json.dumps(value, indent=None if key == "records" else 1) for key, value in found.items()}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in parts.items()) + "\n}\n"


def _described(task: Task, records: TaskRecords | None) -> dict[str, Any]:
    settings = {key: value for key, value in task.model_dump(mode="json").items()
                if key in ("kind", "path") or value != type(task).model_fields[key].default}
    settings.pop("name")
    return settings if records is None else {**settings, "records": len(records.questions), "sha256": records.sha256}


def _metrics(judgement: Judgement) -> dict[str, dict[str, float]]:
    known = {name: dict(zip(("value", "low", "high"), one, strict=False)) for name, one in judgement.known.items()}
    return known | {name: {"value": value_of(outcomes), **dict(zip(("low", "high"), interval(outcomes), strict=True))}
                    for name, outcomes in judgement.outcomes.items()}


def _differences(ours: Judgement, theirs: Judgement) -> dict[str, dict[str, float]]:
    return {name: dict(zip(("value", "low", "high"), difference(outcomes, theirs.outcomes[name]), strict=True))
            for name, outcomes in ours.outcomes.items() if len(theirs.outcomes.get(name, ())) == len(outcomes)}


def _short(outcomes: Sequence[tuple[float, float]]) -> list[Any]:
    """What was reached of each record; with how much of what, where that is not 1."""
    return [_whole(part) if whole == 1 else [part, _whole(whole)] for part, whole in outcomes]


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number

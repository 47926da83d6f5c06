"""Reads the records of a task: questions with their right answers, or texts, each checked before work starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.encoding import LONGEST
from trainer.errors import UserError
from trainer.evaluate.extraction import right_of
from trainer.experiment.evaluate_nodes import Task

PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Question:
    """A record of a task.

    Attributes:
        line: where it is in its file.
        prompt: the question; empty for a text.
        answer: the right answer; the text itself with kind perplexity.
        choices: the texts to choose from; none unless the task is multiple choice.
    """

    line: int
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def right(self) -> int:
        """Which choice is the right one."""
        return self.choices.index(self.answer)


@dataclass(frozen=True)
class TaskRecords:
    """A task with its records.

    Attributes:
        task: as the experiment has it.
        questions: what is judged.
        shots: the solved examples before each question.
        sha256: of the file, by which results say what they are of.
    """

    task: Task
    questions: tuple[Question, ...]
    shots: tuple[Question, ...] = ()
    sha256: str = ""


def read_task(task: Task, key: str) -> TaskRecords:
    """Read the records that a task uses.

    Args:
        task: one with a file of its own.
        key: key of the task in the experiment, for messages: `evaluate.tasks.0`.

    Raises:
        UserError: the file or one of its records cannot be used; names the line.
    """
    assert task.path is not None, "only tasks of the harness have no file"
    own = task.shots if task.examples is None else 0
    most = None if task.limit is None else task.limit + own
    found = tuple(islice(_questions(task, task.path, f"{key}.path", key), most))
    shots = found[:own] if task.examples is None else tuple(
        islice(_questions(task, task.examples, f"{key}.examples", key), task.shots))
    if len(shots) < task.shots:
        raise UserError(f"{key}.shots", f"{task.examples or task.path} has {len(shots)} records for the examples",
                        value=task.shots, way_out=f"ask for {len(shots)} at most")
    if not found[own:]:
        raise UserError(f"{key}.path", "there is no record to judge" if not found else "no record is left to judge "
                        "beside the examples", value=task.path,
                        way_out="name a file with one JSON object on each line")
    return TaskRecords(task, found[own:], shots, _digest(Path(task.path)))


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _questions(task: Task, path: str, place: str, key: str) -> Iterator[Question]:
    """The records of a file, each checked."""
    for line, record in _records(path, place):
        at = f"{path}:{line}"
        if task.kind == "perplexity":
            text = _text(record, task.text, f"{key}.text", at)
            if not text.strip():
                raise UserError(f"{key}.text", f"{at} has only white space in this field", value=task.text,
                                way_out="remove this line")
            yield Question(line, "", text)
            continue
        prompt = _filled(task.prompt, record, f"{key}.prompt", at)
        if task.kind == "multiple_choice":
            yield _choice(task, record, prompt, line, key, at)
        else:
            answer = _text(record, task.answer, f"{key}.answer", at, numbers=True)
            if not right_of(task, answer):
                raise UserError(f"{key}.extract", f"in the right answer of {at} nothing is found: {answer[:100]!r}",
                                value=task.pattern or task.extract, way_out="mend this line, or extract otherwise")
            yield Question(line, prompt, answer)


def _choice(task: Task, record: dict[str, Any], prompt: str, line: int, key: str, at: str) -> Question:
    choices = record.get(task.choices, _MISSING) if isinstance(task.choices, str) else list(task.choices)
    if choices is _MISSING:
        raise _no_field(record, str(task.choices), f"{key}.choices", at)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise UserError(f"{key}.choices", f"{at} has no list of two texts or more in this field, but "
                        f"{json.dumps(choices, ensure_ascii=False)[:100]}", value=task.choices,
                        way_out='write the choices as in ["yes", "no"]')
    if twice := next((one for number, one in enumerate(choices) if one in choices[:number]), None):
        raise UserError(f"{key}.choices", f"{at} has the choice {twice!r} twice", value=task.choices,
                        way_out="mend or remove this line")
    answer = record.get(task.answer, _MISSING)
    if answer is _MISSING:
        raise _no_field(record, task.answer, f"{key}.answer", at)
    if type(answer) is int and 0 <= answer < len(choices):
        answer = choices[answer]
    if not isinstance(answer, str) or answer not in choices:
        raise UserError(f"{key}.answer", f"{at} has the answer {json.dumps(answer, ensure_ascii=False)[:100]}, which "
                        f"is none of its choices {json.dumps(choices, ensure_ascii=False)[:200]}", value=task.answer,
                        way_out=f"write one of the choices, or its number from 0 to {len(choices) - 1}")
    return Question(line, prompt, answer, tuple(choices))


_MISSING = object()


def _filled(prompt: str, record: dict[str, Any], key: str, at: str) -> str:
    """The prompt with the record's fields in the places of their names; a name alone is a field."""
    if "{" not in prompt:
        return _text(record, prompt, key, at)
    return PLACE.sub(lambda found: _text(record, found[1], key, at, numbers=True), prompt)


def _text(record: dict[str, Any], name: str, key: str, at: str, numbers: bool = False) -> str:
    value = record.get(name, _MISSING)
    if value is _MISSING:
        raise _no_field(record, name, key, at)
    if numbers and type(value) in (int, float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(key, f"{at} has no text in this field, but {json.dumps(value, ensure_ascii=False)[:100]}",
                        value=name, way_out="mend or remove this line")
    return value


def _no_field(record: dict[str, Any], name: str, key: str, at: str) -> UserError:
    return UserError(key, f"{at} has no field {name!r}", value=name,
                     way_out=f"its fields are {', '.join(str(one)[:40] for one in list(record)[:20])}")


def _records(path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of each line of a JSONL file that is not empty."""
    if not Path(path).is_file():
        what = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise UserError(key, what, value=path, way_out="name a JSONL file, with one JSON object on each line")
    with open(path, "rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(LONGEST + 1), b""), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if len(line) > LONGEST or not isinstance(record, dict):
                    raise ValueError(f"over {LONGEST:,} bytes" if len(line) > LONGEST else "it is no object {...}")
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
                raise UserError(key, f"{path}:{number} is no JSON object: {why}", value=path,
                                way_out="write one JSON object on each line, in UTF-8") from error
            yield number, record

"""Experiment nodes for tasks that language models are judged on: own files of records, and lm-evaluation-harness."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, PathName, Positive

METRICS = {"multiple_choice": ("accuracy", "accuracy_per_character"), "exact_match": ("exact_match",),
           "perplexity": ("bits_per_byte",), "harness": ()}
LOWER = ("bits_per_byte",)  # metrics of which less is better
ASKING = ("prompt", "answer", "shots", "examples", "separator", "chat", "system")
OF_KIND = {"multiple_choice": (*ASKING, "choices"), "perplexity": ("text",),
           "harness": ("shots", "chat", "trust_remote_code"),
           "exact_match": (*ASKING, "extract", "pattern", "stop", "max_new_tokens")}


class Task(Node):
    """One task: a JSONL file of records with a way to judge answers to them, or a task of lm-evaluation-harness."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Name of the task in results; with kind harness, the harness's own name of it."""
    kind: Literal["multiple_choice", "exact_match", "perplexity", "harness"]
    """Likeliest of several choices, a generated answer, bits per byte of texts, or a task of lm-evaluation-harness."""
    path: PathName | None = None
    """JSONL file of records; with kind harness, a folder of task files (null: those that come with the harness)."""
    prompt: Annotated[str, Field(min_length=1)] = "prompt"
    """Field that holds the question, or a text with fields in braces: "Question: {question}\\nAnswer:"."""
    choices: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=2)] = "choices"
    """Field that holds the list of choices, or the choices themselves if they are the same for all records."""
    answer: Annotated[str, Field(min_length=1)] = "answer"
    """Field that holds the right answer; of choices, the text of the right one or its number, counted from 0."""
    text: Annotated[str, Field(min_length=1)] = "text"
    """Field that holds the text, with kind perplexity."""
    limit: Positive | None = None
    """Use at most this many records, the first ones."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each question."""
    examples: PathName | None = None
    """JSONL file whose first records are these examples; null: the first ones of `path`, which are then not judged."""
    separator: str = " "
    """Text between a question and its answer; in chats there is none."""
    extract: Literal["none", "last_number", "regex"] = "none"
    """What of a generated answer is compared with the same of the right one: all, its last number, or a `pattern`."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """With extract regex: its last match counts, or the first group of that; of a right answer without one, all."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that end a generated answer; null: an empty line, and in chats only the end of the turn."""
    max_new_tokens: Positive = 256
    """Maximum number of tokens of a generated answer."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """System prompt of the chats; null: what the chat template adds by itself."""
    trust_remote_code: bool = False
    """Run the code in the harness's task files of `path`: their functions and templates are programs."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        if self.kind != "harness" and self.path is None:
            raise UserError("path", "this key is required", way_out="name a JSONL file; or write kind: harness for a "
                            "task of lm-evaluation-harness")
        known = (*OF_KIND[self.kind], "name", "kind", "path", "limit")
        for key, info in type(self).model_fields.items():
            if key not in known and getattr(self, key) != info.default:
                raise UserError(key, f"a task of kind {self.kind} has no such key", value=_plain(getattr(self, key)),
                                way_out=f"leave it out; its keys are {', '.join(known)}")
        self._check_pattern()
        if self.examples is not None and not self.shots:
            raise UserError("examples", "no example is asked for", value=self.examples, way_out="add `shots: 3`, or "
                            "leave it out")
        if self.system is not None and not self.chat:
            raise UserError("system", "a system prompt is part of a chat", value=self.system,
                            way_out="add `chat: true`, or write it into `prompt`")
        return self

    def _check_pattern(self) -> None:
        if (self.extract == "regex") != (self.pattern is not None):
            raise UserError("pattern", "`pattern` and `extract: regex` go together", value=self.pattern,
                            way_out="for example `extract: regex` with `pattern: 'The answer is (\\w+)'`")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UserError("pattern", f"this is no regular expression: {error}", value=self.pattern,
                            way_out="mend it; in YAML, single quotes keep backslashes as they are") from error

    @property
    def generates(self) -> bool:
        """Whether the model writes answers, which needs whole weights."""
        return self.kind == "exact_match"

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts that end a generated answer."""
        return self.stop if self.stop is not None else () if self.chat else ("\n\n",)


class Evaluate(Node):
    """Tasks that teacher, student and control are judged on, side by side, when a run ends."""

    tasks: tuple[Task, ...] = ()
    """The tasks: own files of records, and tasks of lm-evaluation-harness."""
    every: Positive | None = None
    """Optimizer steps between evaluations of the student in training on these tasks; null: only when the run ends."""

    @model_validator(mode="after")
    def _named_once(self) -> Evaluate:
        names = [task.name for task in self.tasks]
        if twice := next((number for number, name in enumerate(names) if name in names[:number]), None):
            raise UserError(f"tasks.{twice}.name", "two tasks have this name", value=names[twice],
                            way_out=f"call it {names[twice]}-2, say")
        if self.every is not None and not self.in_training:
            raise UserError("every", "there is no task to evaluate in training" + (
                ": those of lm-evaluation-harness are judged when the run ends" if self.tasks else ""),
                value=self.every, way_out="add one with a `path` of its own, or leave `every` out")
        return self

    @property
    def in_training(self) -> tuple[Task, ...]:
        """Tasks that can be evaluated in training."""
        return tuple(task for task in self.tasks if task.kind != "harness")

    def check_best(self, metric: str) -> None:
        """Raise `UserError` unless `metric`, such as `gsm8k.exact_match`, is one that is evaluated in training."""
        known = [f"{task.name}.{name}" for task in self.in_training for name in METRICS[task.kind]]
        if metric not in known:
            near = difflib.get_close_matches(metric, known, 1, 0.4)
            raise UserError("training.keep_best", "no task of `evaluate` has such a metric", value=metric,
                            way_out=f"did you mean `{near[0]}`?" if near else f"one of {', '.join(known)}" if known else
                            "add the task to evaluate.tasks, or use bits_per_byte")
        if self.every is None:
            raise UserError("training.keep_best", "the student is not evaluated on this task in training",
                            value=metric, way_out="add evaluate.every, for example 100")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""Checks of the tasks of an experiment, before data are read or anything is trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from trainer.evaluate.asking import Prompter
from trainer.evaluate.harness import check_harness
from trainer.evaluate.judge import key_of, read_tasks
from trainer.experiment.evaluate_nodes import Evaluate


def check_tasks(asked: Evaluate) -> None:
    """Raise `UserError` for tasks that models cannot be judged on; reads their files."""
    read_tasks(asked)
    for task in asked.tasks:
        if task.kind == "harness":
            check_harness(task, key_of(asked, task))


def check_prompts(asked: Evaluate, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if a tokenizer cannot write the chats of a task."""
    for one in read_tasks(asked):
        if one.task.chat:
            Prompter(one, tokenizer, key_of(asked, one.task))(one.questions[0])

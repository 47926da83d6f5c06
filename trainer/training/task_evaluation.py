"""Evaluation of the student on tasks during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.distributed.rank_group import RankGroup
from trainer.evaluate.asking import Reader
from trainer.evaluate.judge import judge, key_of, read_tasks
from trainer.experiment.evaluate_nodes import Evaluate

Values = dict[str, dict[str, float]]


class TaskEvaluator:
    """Evaluates a student on the tasks that have files of their own. The result does not depend on the processes.

    Args:
        asked: the tasks.
        student: the unwrapped student.
        tokenizer: its tokenizer.
        tokens: most tokens of a forward pass: those of a micro-batch, whose memory is there.
        ranks: the processes that share the records.
        autocast: returns the autocast context for a forward pass.
    """

    def __init__(self, asked: Evaluate, student: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int,
                 ranks: RankGroup, autocast: Callable[[], AbstractContextManager]) -> None:
        self.asked, self.student, self.tokenizer = asked, student, tokenizer
        self.tokens, self.ranks, self.autocast = tokens, ranks, autocast
        self.records = read_tasks(asked) if asked.every is not None else []

    def __call__(self, called: nn.Module) -> Values | None:
        """The metrics of each task; None if a process received a stop signal.

        Args:
            called: the student as training calls it, wrapped or not.
        """
        reader = Reader(called, self.student, self.tokenizer, self.ranks, self.tokens, self.autocast)
        found: Values = {}
        for one in self.records:
            judged = judge(reader, one, key_of(self.asked, one.task))
            if judged is None:
                return None
            found[one.task.name] = judged.values
        return found

"""Evaluation of the student on the held-out set during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from strategies.common.classification_counts import ClassificationCounts
from strategies.common.progress import report
from strategies.common.running_statistics import RunningStatistics
from strategies.distillation.losses.fused_head import LogitShape
from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.step import Distillation
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.distributed.rank_group import RankGroup
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

Rows = Mapping[str, torch.Tensor]


def check_held_out(rows: Rows) -> None:
    """Raise `UserError` if no held-out row has a target token: the loss would be 0.0 without measuring anything."""
    if not (rows["targets"] != IGNORED).any():
        raise UserError("data.validation", "no held-out row has a target token: all of them are prompt or padding",
                        way_out="hold out more rows (data.validation.rows), or raise data.sequence_length, so that "
                        "responses are not cut off")


def held_out_evaluator(data: Data, text: PreparedData, student: nn.Module, shape: LogitShape | None, micro_batch: int,
                       ranks: RankGroup, autocast: Callable[[], AbstractContextManager]
                       ) -> Evaluator | ClassifierEvaluator:
    """What evaluates a student of the task of `data` on the held-out rows of `text`; arguments as of its class."""
    if data.is_language:
        return Evaluator(student, shape, text.held_out, micro_batch, ranks, autocast, text.held_out_of)
    return ClassifierEvaluator(text.held_out, len(text.classes), micro_batch, ranks, autocast)


class ClassifierEvaluator:
    """Evaluates a classifier on held-out rows. The result does not depend on the number of processes.

    Args:
        rows: the inputs of the model and `targets`, stacked by name.
        classes: number of classes.
        micro_batch: rows per forward pass on each process.
        ranks: the processes that share the rows.
        autocast: returns the autocast context for a forward pass.
    """

    def __init__(self, rows: Rows, classes: int, micro_batch: int, ranks: RankGroup,
                 autocast: Callable[[], AbstractContextManager]) -> None:
        check_held_out(rows)
        self.rows, self.classes, self.micro_batch, self.ranks = rows, classes, micro_batch, ranks
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, called: nn.Module, step: int) -> dict[str, Any] | None:
        """Return cross-entropy in nats, accuracy, macro F1 and calibration error; see `ClassificationCounts.figures`.

        Returns None if a process received a stop signal. All processes agree on that before each micro-batch.

        Args:
            called: the student as training calls it, wrapped or not.
            step: the number of steps done, for the message about a process that fails to arrive.
        """
        counts = ClassificationCounts(self.classes, self.ranks.device, self.ranks.wide)
        RunningStatistics(called).average(self.ranks.total, self.ranks.topology.ranks)
        called.eval()
        try:
            every = slice(0, len(self.rows["targets"]))
            for batch in held_out_batches(self.rows, every, self.micro_batch, self.ranks, step):
                if batch is None:
                    return None
                with self._autocast():
                    logits = called(**model_inputs(batch)).logits
                counts.add(logits, batch["targets"], IGNORED)
        finally:
            called.train()
        self.ranks.at(f"the held-out figures after step {step}")
        return counts.take(self.ranks.total(counts.numbers())).figures()


class Evaluator:
    """Evaluates a student on held-out rows. The result does not depend on the number of processes.

    Args:
        student: the unwrapped student.
        shape: how the student post-processes its logits (scaling, capping); None if unknown.
        rows: `input_ids`, `position_ids`, `targets` (rows, sequence), and `bytes` (rows,).
        micro_batch: rows per forward pass on each process.
        ranks: the processes that share the rows.
        autocast: returns the autocast context for a forward pass.
        sources: of a mixture, which rows are of which source.
    """

    def __init__(self, student: nn.Module, shape: LogitShape | None, rows: Rows, micro_batch: int, ranks: RankGroup,
                 autocast: Callable[[], AbstractContextManager], sources: Mapping[str, slice] | None = None) -> None:
        check_held_out(rows)
        self.rows, self.micro_batch, self.ranks = rows, micro_batch, ranks
        self.sources = dict(sources or {})
        self._autocast = autocast
        self._loss = Distillation(ResponseObjective(divergences=()), student, shapes=(shape, None))

    @torch.no_grad()
    def __call__(self, called: nn.Module, step: int) -> dict[str, Any] | None:
        """Return bits per byte, and cross-entropy per token in nats; of a mixture also bits per byte of each source.

        Returns None if a process received a stop signal. All processes agree on that before each micro-batch.

        Args:
            called: the student as training calls it, wrapped or not.
            step: the number of steps done, for the message about a process that fails to arrive.
        """
        called.eval()
        whole, sums = slice(0, len(self.rows["targets"])), []
        try:
            for part in self.sources.values() or [whole]:
                if (own := self._sums(called, step, part)) is None:
                    return None
                sums.append(own)
        finally:
            called.train()
        self.ranks.at(f"the held-out loss after step {step}")
        totals = self.ranks.read_totals(*(one for own in sums for one in own))
        nats, tokens = totals[::2], totals[1::2]
        found: dict[str, Any] = {"bits_per_byte": self._per_byte(sum(nats), whole),
                                 "cross_entropy": sum(nats) / sum(tokens)}
        if self.sources:
            found["sources"] = {name: self._per_byte(own, part)
                                for (name, part), own in zip(self.sources.items(), nats, strict=True)}
        return found

    def _per_byte(self, nats: float, part: slice) -> float:
        """Bits per byte of text in some rows."""
        return nats / math.log(2) / max(1, int(self.rows["bytes"][part].sum()))

    def _sums(self, called: nn.Module, step: int, part: slice) -> torch.Tensor | None:
        """(2,) summed nats and targets of this process's rows in a part; None if a process received a stop signal."""
        sums = torch.zeros(2, dtype=self.ranks.wide, device=self.ranks.device)
        for batch in held_out_batches(self.rows, part, self.micro_batch, self.ranks, step):
            if batch is None:
                return None
            with self._autocast():
                sums[0] += self._loss(called, model_inputs(batch), batch["targets"])[0].to(self.ranks.wide)
            sums[1] += (batch["targets"] != IGNORED).sum()
        return sums


def held_out_batches(rows: Rows, part: slice, size: int, ranks: RankGroup, step: int
                     ) -> Iterator[dict[str, torch.Tensor] | None]:
    """This process's batches of a part of the held-out rows, on its device; None, and no more, after a stop signal.

    All processes agree on that before each batch. Every process has as many batches: one that has run out of rows
    repeats the first one with all targets ignored.

    Args:
        size: rows of a batch.
        step: the number of steps done, for the message about a process that fails to arrive.
    """
    for begin in range(part.start, part.stop, size * ranks.topology.data_parallel):
        ranks.at(f"held-out rows from {begin} on, after step {step}")
        report("held-out rows", begin, len(rows["targets"]))
        if ranks.asked_to_stop():
            yield None
            return
        own = begin + ranks.replica * size
        batch = {name: tensor[own:max(own, min(own + size, part.stop))] for name, tensor in rows.items()}
        if len(batch["targets"]):
            yield ranks.place(batch)
            continue
        batch = ranks.place({name: tensor[:1] for name, tensor in rows.items()})
        yield {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}

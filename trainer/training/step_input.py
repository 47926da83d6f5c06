"""What each step begins with: micro-batches, the number of their target tokens, and whether all agreed to stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from strategies.distillation.losses.response import IGNORED
from strategies.distillation.on_policy import written_rows
from trainer.data.batches import Batch, training_batches
from trainer.data.dataset import PreparedData
from trainer.distributed import signals
from trainer.distributed.rank_group import RankGroup
from trainer.experiment.experiment import Experiment
from trainer.experiment.objective_nodes import OnPolicy
from trainer.planning.plan import Plan


@dataclass
class StepInput:
    """What a step begins with.

    Attributes:
        micro_batches: of this process, on the CPU.
        tokens: target tokens of the step on all processes.
        stops: whether a process was asked to stop before it; all have agreed.
    """

    micro_batches: list[Batch]
    tokens: int
    stops: bool


class StepInputs:
    """Brings the input of one step after another, and looks one step ahead.

    While the device computes a step, the next one's micro-batches are fetched, and their tokens are summed over
    processes by the reduction that the step makes anyway: no step begins with one of its own.

    Args:
        batches: this process's micro-batches, from the first that is not trained on yet.
        plan: micro-batches of a step, and steps of the run.
        ranks: that agree.
        write: gives a micro-batch in which the student goes on by itself, for on-policy distillation.
        written: whether a step, counted from 0, is on what the student writes.
    """

    def __init__(self, batches: Iterator[Batch], plan: Plan, ranks: RankGroup,
                 write: Callable[[Batch, int, int], Batch] | None = None,
                 written: Callable[[int], bool] = lambda step: False) -> None:
        self.batches, self.plan, self.ranks = batches, plan, ranks
        self._write, self._written = write, written
        self._ahead: list[Batch] | None = None
        self._agreed: StepInput | None = None

    def take(self, step: int) -> StepInput:
        """The input of a step, counted from 0."""
        given, self._agreed = self._agreed, None
        if given is None:
            given = self._first(step)
        elif self.ranks.topology.ranks == 1:
            given.stops = signals.asked() is not None
        return given

    def look_ahead(self, step: int) -> tuple[float, float]:
        """Fetch what follows a step, and give what is to be summed over processes for `agree`."""
        following = step + 1
        if following < self.plan.steps and not self._written(following):
            self.ranks.at(f"the batch of step {following + 1}")
            self._ahead = self._fetch()
        return self._counts(self._ahead or [])

    def agree(self, tokens: float, stops: float) -> None:
        """Take the sums of what `look_ahead` gave."""
        if self._ahead is not None:
            self._agreed, self._ahead = StepInput(self._ahead, int(tokens), bool(stops)), None

    def _first(self, step: int) -> StepInput:
        """The input of a step that the one before could not look ahead to: the first, or what the student writes."""
        self.ranks.at(f"the batch of step {step + 1}")
        micro_batches = self._fetch()
        if self._written(step):
            self.ranks.at(f"the texts that the student writes for step {step + 1}")
            micro_batches = [self._write(batch, step, index) for index, batch in enumerate(micro_batches)]
        self.ranks.at(f"the sum of target tokens of step {step + 1}")
        tokens, stops = self._counts(micro_batches)
        if self.ranks.topology.ranks > 1:
            tokens, stops = self.ranks.read_totals(tokens, stops)
        return StepInput(micro_batches, int(tokens), bool(stops))

    def _fetch(self) -> list[Batch]:
        return [next(self.batches) for _ in range(self.plan.accumulation)]

    @staticmethod
    def _counts(micro_batches: list[Batch]) -> tuple[float, float]:
        """Target tokens of this process, and whether it was asked to stop."""
        return float(sum(int((batch["targets"] != IGNORED).sum()) for batch in micro_batches)), float(
            signals.asked() is not None)


class Writer:
    """Rows that the student goes on with by itself, in place of those of a micro-batch.

    Args:
        settings: which steps, and how much is written.
        seed: of the experiment.
        plan: of the run.
        ranks: of which each writes other texts.
        text: whose tokenizer ends and pads.
        student: without wrappers.
        autocast: makes the context of a forward pass.
    """

    def __init__(self, settings: OnPolicy | None, seed: int, plan: Plan, ranks: RankGroup, text: PreparedData,
                 student: nn.Module, autocast: Callable[[], AbstractContextManager]) -> None:
        self.settings, self.seed, self.plan, self.ranks = settings, seed, plan, ranks
        self.tokenizer, self.student, self.autocast = text.tokenizer, student, autocast

    def writes(self, step: int) -> bool:
        """Whether a step is on what the student writes; the same on every process."""
        asked = self.settings
        return asked is not None and random.Random(f"{self.seed} {step}").random() < asked.fraction

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """A micro-batch, of this number in its step, as the student writes it."""
        asked, replicas = self.settings, self.plan.topology.data_parallel
        seed = ((self.seed * self.plan.steps + step) * self.plan.accumulation + number) * replicas + self.ranks.replica
        there = batch["row"] >= 0  # the end of the run may lie in this batch
        if not there.any():
            return {**batch, "written": torch.ones(())}
        with self.autocast():
            given = self.ranks.place({name: batch[name][there] for name in ("input_ids", "position_ids", "targets")})
            rows = written_rows(self.student, given, prompt_tokens=asked.prompt_tokens, new_tokens=asked.new_tokens,
                                temperature=asked.temperature, seed=seed, end=self.tokenizer.eos_token_id,
                                padding=self.tokenizer.pad_token_id)
        whole = {name: batch[name].to(tensor.device).index_put((there.nonzero()[:, 0].to(tensor.device),), tensor)
                 for name, tensor in rows.items()}
        return {**batch, **whole, "written": torch.ones(())}


def batches_of(experiment: Experiment, plan: Plan, ranks: RankGroup, text: PreparedData, step: int) -> Iterator[Batch]:
    """This process's micro-batches from a step on."""
    training = experiment.training
    with signals.block_signals_in_children():
        return training_batches(
            text.train, seed=experiment.seed, micro_batch=plan.micro_batch, replica=ranks.replica,
            replicas=plan.topology.data_parallel, skip=step * plan.batch_size, workers=experiment.data.workers,
            pin=ranks.device.type == "cuda", end=training.seen(len(text.train)) if training.epochs else None)

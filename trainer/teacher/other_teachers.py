"""Several teachers of one student: the models, caches and vocabularies of those beside the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.live_teacher import OnDemand, always
from strategies.distillation.losses.teacher_targets import Targets
from strategies.distillation.several_teachers import OtherTeacher
from strategies.memory.ledger import parameter_bytes
from trainer.data.batches import Batch
from trainer.data.dataset import PreparedData
from trainer.data.tokenizers import apart_size, known_size
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.models.build import build_teacher, shape_of
from trainer.models.configs import check_shapes, teacher_config
from trainer.models.model_trials import check_early_causal
from trainer.teacher.resident_teacher import check_sizes, example_targets, live, resident_teacher, sizes
from trainer.teacher.target_cache import CachedTargets, cached_targets
from trainer.teacher.vocabularies import check_places_of_tokens, match_vocabularies


@contextmanager
def of_other(number: int) -> Iterator[None]:
    """Name the keys of one of the other teachers, counted from 0, in errors that name those of a teacher."""
    try:
        yield
    except UserError as error:
        name = error.key.removeprefix("teacher.")
        if error.key.startswith("teacher.") and name.partition(".")[0] in ("path", "dtype", "architecture", "revision"):
            error.key = f"teacher.others.{number}.{name}"
        raise


def check_others(experiment: Experiment, student: PretrainedConfig, tokens: int | None, offline: bool = False) -> None:
    """Raise `UserError` for other teachers whose shapes do not fit the student or the tokenizer."""
    for number, one in enumerate(experiment.by_other_teachers):
        with of_other(number):
            config = teacher_config(one.teacher, tokens, offline)
            check_shapes(one, config, student, tokens)
            check_early_causal(one.teacher, "teacher", config)


@dataclass(frozen=True)
class Beside:
    """One of the other teachers of a run.

    Attributes:
        judge: as the loss needs it.
        cached: reads its targets for a micro-batch; None if it is live.
    """

    judge: OtherTeacher
    cached: CachedTargets | None

    @property
    def resident(self) -> list[nn.Module]:
        """What of it stays in memory."""
        held = self.judge.model if self.cached is None else self.cached.head
        return [] if held is None else [held]


def build_others(experiment: Experiment, student: PretrainedConfig, text: PreparedData, accelerator: Accelerator,
                 check: Callable[[Experiment, nn.Module], None]) -> list[Beside]:
    """Load the other teachers, one after the other; of those whose targets are cached, only what that leaves is kept.

    Args:
        check: runs a teacher on small inputs.

    Raises:
        UserError: one of them does not fit the student or the data; what `cached_targets` raises.
    """
    found = []
    for number, one in enumerate(experiment.by_other_teachers):
        with of_other(number):
            config = teacher_config(one.teacher, None)
            model = build_teacher(one.teacher, config)
            check(one, model)
            common, reader = match_vocabularies(one, text, student, config)
            check_places_of_tokens(one.teacher, common)
            share = experiment.teacher.shares[number + 1]
            if one.teacher.targets.source != "live":
                cached = cached_targets(one, accelerator, text, model, common)
                found.append(Beside(OtherTeacher(share, common=common), cached))
                continue
        judge = OtherTeacher(share, model, shape_of(model), common, reader)
        found.append(Beside(judge, None))
    return found


def present_on_demand(model: nn.Module, device: torch.device, takes_turns: bool) -> Callable:
    """Context manager within which a live teacher is on the device; without turns it is moved there once for all."""
    if takes_turns and device.type != "cpu":
        return OnDemand(model, device)
    model.to(device)
    return always


def placed(others: Sequence[Beside], device: torch.device, take_turns: bool) -> list[Beside]:
    """The same teachers on their device, or waiting for their turn on it."""
    return [one if one.judge.model is None else replace(one, judge=replace(one.judge, present=present_on_demand(
        one.judge.model, device, take_turns))) for one in others]


# ---- for planning, from shapes alone

@dataclass(frozen=True)
class PlannedOthers:
    """The other teachers of a planned step; to be made under `FakeTensorMode`.

    Attributes:
        judges: as the loss needs them.
        resident: what of each stays in memory.
        targets: makes example targets for a batch; None if they are live.
    """

    judges: list[OtherTeacher]
    resident: list[nn.Module]
    targets: Callable[[Batch], list[Targets]] | None

    @classmethod
    def of(cls, experiment: Experiment, student: PretrainedConfig) -> PlannedOthers:
        """Those of an experiment."""
        each = experiment.by_other_teachers
        configs = [teacher_config(one.teacher, None, offline=True) for one in each]
        held = [resident_teacher(one.teacher, config) for one, config in zip(each, configs, strict=True)]
        tokens = known_size(experiment.data.tokenizer, experiment.with_weights)
        judges = []
        for number, (one, config, model) in enumerate(zip(each, configs, held, strict=True)):
            with of_other(number):
                check_sizes(one.teacher, student, config, tokens)
            common = sizes(student, config, tokens, apart_size(
                one.teacher, one.student, one.objective.divergence.name))
            alive = live(model)
            judges.append(OtherTeacher(experiment.teacher.shares[number + 1], alive, common=common))

        def targets(batch: Batch) -> list[Targets]:
            temperature = experiment.objective.divergence.temperature
            return [example_targets(one.teacher, temperature, config, batch, model)
                    for one, config, model in zip(each, configs, held, strict=True)]

        cached = any(one.teacher.targets.source != "live" for one in each)
        return cls(judges, [one for one in held if one is not None], targets if cached else None)


def together(first: nn.Module | None, others: Sequence[nn.Module], take_turns: bool) -> nn.Module | None:
    """What of all teachers is on a device at the peak of a step: all, or the largest where they take turns."""
    every = [one for one in (first, *others) if one is not None]
    if take_turns:
        every = sorted(every, key=parameter_bytes)[-1:]
    return None if not every else every[0] if len(every) == 1 else nn.ModuleList(every)

"""Several teachers of one student: those beside the first, and their place on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from strategies.distillation.live_teacher import OnDemand, always
from strategies.distillation.several_teachers import OtherTeacher
from trainer.errors import UserError
from trainer.teacher.target_cache import CachedTargets


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


@dataclass(frozen=True)
class Beside:
    """One of the other teachers of a run.

    Attributes:
        judge: as the loss needs it.
        cached: reads its targets for a micro-batch; None if there are none.
        commit: of the hub that its weights are from; None for a folder.
    """

    judge: OtherTeacher
    cached: CachedTargets | None
    commit: str | None = None

    @property
    def resident(self) -> list[nn.Module]:
        """What of it stays in memory."""
        held = self.judge.model, None if self.cached is None else self.cached.head
        return [one for one in held if one is not None]


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

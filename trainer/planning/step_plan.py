"""Plans a training step within a memory budget: the schedules of its blocks and the tile size of its loss.

Works from shapes alone. A schedule says which activations a block keeps and which it recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.common.cpu_products import fp32_products
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.recompute_plan import BudgetError, RecomputePlan
from strategies.rematerialization.rematerialize import Refuted, try_blocks
from strategies.rematerialization.solve.checkmate import NotExact
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.planning.refusal import Fit, refuse
from trainer.planning.step_memory import NONE, MemoryPlan, StepStudy, describe, named_parts

LEAST_TILE = 2**20  # bytes of a tile of logits in the loss when memory is short


@dataclass(frozen=True)
class StepPlan:
    """A planned step, with the objects that carry it out.

    Attributes:
        memory: the plan as plain data.
        base: bytes held when a step begins.
        schedule: the schedule of the student's blocks; None if they run unchanged.
        planner: installs that schedule in a model; None without one.
    """

    memory: MemoryPlan
    base: int
    schedule: RecomputePlan | None = field(default=None, repr=False)
    planner: Planner | None = field(default=None, repr=False)

    @property
    def tile(self) -> int | None:
        """Bytes of a tile of logits in the loss; None for the device's default."""
        return self.memory.tile

    def install(self, student: nn.Module, inductor: bool = False) -> None:
        """Install the schedule in a student of the planned shapes.

        Args:
            inductor: run the schedule through Inductor instead of eager kernels.
        """
        if self.planner is not None and self.schedule is not None:
            self.planner.install(self.schedule, inductor=inductor, model=student)

    def refuted(self, student: nn.Module, run: Callable[[], object]) -> dict[str, Refuted]:
        """Run a student on real data, and find the blocks that do not compute what their captured graphs compute.

        A plan made from shapes alone cannot tell.

        Args:
            run: calls the student with a micro-batch.

        Returns:
            Those blocks, by name, each with the reason.
        """
        return {} if self.planner is None else try_blocks(self.planner, student, run)


def plan_step(experiment: Experiment, topology: Topology, teacher: PretrainedConfig | None, student: PretrainedConfig,
              refuted: Mapping[str, Refuted] = NONE) -> StepPlan | None:
    """Plan a step for the budget.

    Returns None where the architecture cannot run without data, if there is no budget to keep.

    Args:
        refuted: blocks that do not compute what their captured graphs compute, by name.

    Raises:
        BudgetUnmet: no plan fits the budget.
        UserError: the budget cannot be promised for this architecture, because it cannot run without data.
    """
    def study(changed: Experiment) -> Study:
        return StepStudy(changed, teacher, student, topology, refuted, brief=changed is not experiment)

    try:
        with as_in_training(topology):
            planner, schedule, tile, keep_all = choose(experiment, study, topology)
            memory = describe(planner, schedule, tile, keep_all)
    except (RuntimeError, NotImplementedError) as error:  # some mixtures of experts branch on their data
        if experiment.memory.bytes is None:
            return None
        raise UserError("memory.budget", f"cannot be promised for this architecture: {error}",
                        value=experiment.memory.budget, way_out="leave memory.budget out") from error
    if not planner.calls:  # the models that were studied are not kept
        return StepPlan(memory, planner.frame.base)
    return StepPlan(memory, planner.frame.base, schedule, planner)


Study = Callable[[bool, int | None], Planner]  # given whether to capture the blocks, and the bytes of a tile


class Chosen(NamedTuple):
    """The chosen schedule and loss tile of a step.

    Attributes:
        planner: the study of the step.
        schedule: the schedule of its blocks.
        tile: bytes of a tile of logits in the loss; None for the device's default.
        keep_all: peak memory without a budget, in bytes.
    """

    planner: Planner
    schedule: RecomputePlan
    tile: int | None
    keep_all: int


class _Unmet(Exception):
    """No schedule fits the budget.

    Attributes:
        error: gives the lowest peak found and the lower bound.
        least: the plan with the lowest peak.
    """

    def __init__(self, error: BudgetError, least: RecomputePlan) -> None:
        self.error, self.least = error, least

    def beside(self, other: RecomputePlan) -> _Unmet:
        """The same when another plan was found, too."""
        error = self.error.beside(other)
        return self if error is self.error else _Unmet(error, other)


def as_in_training(topology: Topology) -> AbstractContextManager[None]:
    """Context manager within which fp32 products on a CPU are those of training, with their buffers.

    Of several processes they are not oneDNN's: their budgets were measured without its buffers only.
    """
    return fp32_products(torch.device("cuda" if topology.on_gpu else "cpu"), faster=topology.ranks == 1)


def choose(experiment: Experiment, study: Callable[[Experiment], Study], topology: Topology) -> Chosen:
    """Study an experiment's step, and choose its schedule and the tile size of its loss.

    Args:
        study: studies the step of an experiment.

    Raises:
        BudgetUnmet: no plan fits.
        UserError: with `memory.solver: exact`, a block has too many operations for the exact program, or its optimum
            was not proven in time.
    """
    def attempt(changed: Experiment) -> _Trial:
        return _Trial(changed.memory.bytes, study(changed))

    try:
        with as_in_training(topology):
            return _choose(experiment.memory.bytes, study(experiment))
    except NotExact as error:
        raise UserError("memory.solver", str(error), value=experiment.memory.solver,
                        way_out="use `auto`, which says how much a better schedule could save at most (the gap, "
                                "in the plan), or a model of smaller blocks") from error
    except _Unmet as unmet:
        raise refuse(experiment, unmet.error, *named_parts(unmet.least), attempt, topology) from unmet.error


def plan_or_least(experiment: Experiment, study: Study) -> tuple[RecomputePlan, bool]:
    """The plan of a step for its budget, or one of the lowest peak found; and whether it fits.

    Where the lower bound shows that no plan fits, none is searched, so that the lowest peak is that of nothing
    recomputed.
    """
    budget, planner = experiment.memory.bytes, study(False, None)
    usual = planner.keep_all()
    if budget is None:
        return usual, True
    try:
        found = _kept(budget, study, planner) or _planned(budget, study, usual.peak, hopeless=True)
    except _Unmet as unmet:
        return min(unmet.least, usual, key=lambda plan: plan.peak), planner.fits_as_it_is(budget)
    return found.schedule, True


def _choose(budget: int | None, study: Study) -> Chosen:
    """See `choose`.

    If the model fits without recomputation, no schedule is searched. Otherwise the tile is the default or the smallest
    one, whichever needs less recomputation. A budget within the margin of the plan without one, which nothing else
    keeps, is met by that plan, so that the peak that is shown without a budget is a budget that works.
    """
    planner = study(False, None)
    usual = planner.keep_all()
    if budget is None:
        return Chosen(planner, usual, None, usual.peak)
    try:
        return _kept(budget, study, planner) or _planned(budget, study, usual.peak)
    except _Unmet as unmet:
        if planner.fits_as_it_is(budget):
            return Chosen(planner, replace(usual, budget=budget), None, usual.peak)
        raise unmet.beside(usual) from unmet.error


def _kept(budget: int, study: Study, planner: Planner) -> Chosen | None:
    """The plan without recomputation at the largest tile that fits, with a margin for what counting misses, or None.

    Args:
        planner: the study at the device's default tile.
    """
    usual = planner.keep_all().peak
    if planner.fits_as_it_is(budget, margin=True):
        return Chosen(planner, replace(planner.keep_all(), budget=budget), None, usual)
    least = study(False, LEAST_TILE)
    if not least.fits_as_it_is(budget, margin=True):
        return None
    # The temporaries of a small tile take up to about fifteen times its bytes.
    larger = LEAST_TILE + (budget - least.keep_all().peak) // 16
    for planner, tile in ((study(False, larger), larger), (least, LEAST_TILE)):
        if planner.fits_as_it_is(budget, margin=True):
            return Chosen(planner, replace(planner.keep_all(), budget=budget), tile, usual)
    return None


def _planned(budget: int, study: Study, usual: int, hopeless: bool = False) -> Chosen:
    """A schedule for the blocks, at the default or the smallest tile, whichever recomputes less; see `_choose`.

    Args:
        hopeless: give up at once, without a search, if the lower bound on the peak is above the budget.
    """
    planner = study(True, LEAST_TILE)
    if hopeless and planner.least_bound > budget:
        raise _Unmet(BudgetError(budget, planner.least_bound, planner.least_bound, {}), planner.keep_all())
    try:
        least = Chosen(planner, planner.plan(budget), LEAST_TILE, usual)
    except BudgetError as error:
        raise _Unmet(error, planner.least) from error
    if not least.schedule.overhead:
        return least
    try:
        planner = study(True, None)
        return min(Chosen(planner, planner.plan(budget), None, usual), least, key=lambda one: one.schedule.overhead)
    except BudgetError:
        return least


class _Trial:
    """Implements `trainer.planning.refusal.Trial`."""

    def __init__(self, budget: int, study: Study) -> None:
        self._budget, self._study = budget, cache(study)

    @cached_property
    def _least(self) -> Planner | None:
        try:
            return self._study(False, LEAST_TILE)
        except (UserError, RuntimeError, NotImplementedError):
            return None

    @property
    def peak(self) -> int | None:
        return None if self._least is None else self._least.keep_all().peak

    @property
    def possible(self) -> bool:
        frame = None if self._least is None else self._least.frame
        return frame is not None and max(frame.base, frame.end, frame.update) <= self._budget

    def as_it_is(self) -> Fit | None:
        fits = self._least is not None and self._least.fits_as_it_is(self._budget)
        return self._fit(lambda: _kept(self._budget, self._study, self._study(False, None))) if fits else None

    def searched(self) -> Fit | None:
        return self._fit(lambda: _planned(self._budget, self._study, 0, hopeless=True))

    @staticmethod
    def _fit(find: Callable[[], Chosen | None]) -> Fit | None:
        try:
            found = find()
        except (_Unmet, UserError, RuntimeError, NotImplementedError):
            return None
        return None if found is None else (found.schedule.peak, found.schedule.overhead)

"""How a training step runs within a budget: the schedule of its blocks and the tile of its loss, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from strategies.rematerialization.planner import Planner
from strategies.rematerialization.recompute_plan import BudgetError, RecomputePlan
from strategies.rematerialization.rematerialize import Refuted, try_blocks
from strategies.rematerialization.solve.checkmate import NotExact
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.planning.refusal import Fit, refuse
from trainer.planning.step_memory import NONE, MemoryPlan, describe, named_parts, study_experiment

LEAST_TILE = 2**20  # bytes of logits at a time in the loss, where bytes are short


@dataclass(frozen=True)
class StepPlan:
    """A step that is planned, and what carries it out.

    Attributes:
        memory: the same as plain data.
        schedule: of the student's blocks.
        planner: what was learned of the step, which installs schedules.
    """

    memory: MemoryPlan
    schedule: RecomputePlan = field(repr=False)
    planner: Planner = field(repr=False)

    @property
    def tile(self) -> int | None:
        """Bytes of logits at a time in the loss; None for the device's usual."""
        return self.memory.tile

    def install(self, student: nn.Module, inductor: bool = False) -> None:
        """Make a student of the planned shapes run by the schedule."""
        self.planner.install(self.schedule, inductor=inductor, model=student)

    def refuted(self, student: nn.Module, run: Callable[[], object]) -> dict[str, Refuted]:
        """Blocks of a student with data that do not compute what their captured graphs do, by name.

        Shapes alone could not tell.

        Args:
            run: calls the student with a micro-batch.
        """
        return try_blocks(self.planner, student, run)


def plan_step(experiment: Experiment, topology: Topology, teacher: PretrainedConfig | None, student: PretrainedConfig,
              refuted: Mapping[str, Refuted] = NONE) -> StepPlan | None:
    """Plan a step for the budget; None where the architecture cannot run without data and no budget is to be kept.

    Args:
        refuted: blocks that are not what their captured graphs say, by name.

    Raises:
        BudgetUnmet: no plan fits the budget.
        UserError: the budget cannot be promised for this architecture.
    """
    def again(changed: Experiment, regions: bool, tile: int | None) -> Planner:
        return study_experiment(changed, teacher, student, topology, regions, tile, refuted)

    try:
        planner, schedule, tile, keep_all = choose(experiment, again, topology)
    except (RuntimeError, NotImplementedError) as error:  # some mixtures of experts look at their data
        if experiment.memory.bytes is None:
            return None
        raise UserError("memory.budget", f"cannot be promised for this architecture: {error}",
                        value=experiment.memory.budget, way_out="leave memory.budget out") from error
    return StepPlan(describe(planner, schedule, tile, keep_all), schedule, planner)


Again = Callable[[Experiment, bool, int | None], Planner]


class Chosen(NamedTuple):
    """How an experiment's step is to run.

    Attributes:
        planner: what was learned of the step.
        schedule: of its blocks.
        tile: bytes of logits at a time in the loss; None for the device's usual.
        keep_all: bytes at the peak without a budget.
    """

    planner: Planner
    schedule: RecomputePlan
    tile: int | None
    keep_all: int


class _Unmet(Exception):
    """No schedule fits.

    Attributes:
        error: what is possible.
        least: the plan with the least peak.
    """

    def __init__(self, error: BudgetError, least: RecomputePlan) -> None:
        self.error, self.least = error, least


def choose(experiment: Experiment, again: Again, topology: Topology) -> Chosen:
    """What was learned of the experiment's step, its schedule, and the loss's tile.

    Args:
        again: studies an experiment, with or without a schedule for its blocks in view, at a tile of so many bytes.

    Raises:
        BudgetUnmet: no plan fits.
    """
    def attempt(changed: Experiment) -> _Trial:
        return _Trial(changed.memory.bytes, lambda regions, tile: again(changed, regions, tile))

    try:
        return _choose(experiment.memory.bytes, lambda regions, tile: again(experiment, regions, tile))
    except NotExact as error:
        raise UserError("memory.solver", str(error), value=experiment.memory.solver,
                        way_out="use `auto`, which says how much a better schedule could save at most (the gap, "
                                "in the plan), or a model of smaller blocks") from error
    except _Unmet as unmet:
        raise refuse(experiment, unmet.error, *named_parts(unmet.least), attempt, topology) from unmet.error


def _choose(budget: int | None, study: Callable[[bool, int | None], Planner]) -> Chosen:
    """See `choose`.

    Where the model fits as it is, nothing is planned, with as large a tile as fits. Else the tile is the usual or the
    least one, whichever has less recomputed.
    """
    planner, tile = study(False, None), None
    usual = planner.keep_all().peak
    if budget is not None and not planner.fits_as_it_is(budget):
        planner, tile = study(False, LEAST_TILE), LEAST_TILE
        spare = budget - planner.keep_all().peak
        if spare > 0:  # what is made of a tile takes up to some fifteen times its bytes where it is small
            tile = LEAST_TILE + spare // 16
            planner = study(False, tile)
    if budget is None or planner.fits_as_it_is(budget):
        schedule = planner.keep_all()
        schedule.budget = budget
        return Chosen(planner, schedule, tile, usual)
    return _planned(budget, study, usual)


def _planned(budget: int, study: Callable[[bool, int | None], Planner], usual: int, hopeless: bool = False) -> Chosen:
    """A schedule for the blocks, at the usual or the least tile, whichever has less recomputed; see `_choose`.

    `hopeless` where what cannot fit is to be found out quickly.
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
    """See `trainer.planning.refusal.Trial`."""

    def __init__(self, budget: int, study: Callable[[bool, int | None], Planner]) -> None:
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
        return self._fit(lambda: _choose(self._budget, self._study)) if fits else None

    def searched(self) -> Fit | None:
        return self._fit(lambda: _planned(self._budget, self._study, 0, hopeless=True))

    @staticmethod
    def _fit(find: Callable[[], Chosen]) -> Fit | None:
        try:
            found = find().schedule
        except (_Unmet, UserError, RuntimeError, NotImplementedError):
            return None
        return found.peak, found.overhead

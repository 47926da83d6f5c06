"""The budget of bytes: what a training step of an experiment needs, and the plan that makes it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.distillation.step import Distillation
from strategies.memory.plot import curve, thinned
from strategies.memory.residency import Residency
from strategies.memory.units import parse_bytes
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.step_trace import off_the_path
from strategies.rematerialization.recompute_plan import BudgetError
from strategies.rematerialization.recompute_plan import RecomputePlan as Schedule
from strategies.rematerialization.rematerialize import study
from strategies.rematerialization.solve.checkmate import NotExact
from trainer.data.batches import Batch
from trainer.data.tokenizers import apart_size, known_size
from trainer.distributed.rank_memory import gradients_stay, in_backward, is_sharded
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.precision import DTYPES as COMPUTE
from trainer.models.build import empty_student
from trainer.models.router_balance import balancing_weight
from trainer.planning.refusal import Fit, refuse
from trainer.teacher.intermediate_losses import attach_projections, build_intermediate
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.target_cache import check_sizes, example_targets, live, rank_residency, resident_teacher, sizes

POINTS = 600  # of a curve that is kept for the picture
LEAST_TILE = 2**20  # bytes of logits at a time in the loss, where bytes are short


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step in each process, and what is recomputed so that they fit.

    Attributes:
        budget: bytes allowed; None where there is no limit.
        peak: predicted bytes at the peak.
        keep_all: predicted bytes at the peak without a budget: nothing recomputed, the loss in its usual tiles.
        moment: when the peak is.
        parts: bytes at the peak by what they are; their sum is the peak.
        recomputed: recomputation as a share of the time of the blocks' forward and backward, predicted.
        gap: share of that time which a better schedule could save at most, proven.
        blocks: for every block, how it runs: bytes kept, seconds recomputed, and the segment it is in.
        unplanned: blocks that run as they are because they could not be captured, and why.
        curve: planned bytes over one micro-batch's step, as (position, bytes).
        marks: (phase, position) where phases begin.
        tile: bytes of logits at a time in the loss; None for the device's usual.
        solver: what found the blocks' schedules; "exact" where each is a proven optimum for its bytes and its peak.
    """

    budget: int | None
    peak: int
    keep_all: int
    moment: str
    parts: dict[str, int]
    recomputed: float
    gap: float
    blocks: list[dict[str, Any]]
    unplanned: list[str]
    curve: list[tuple[int, int]]
    marks: list[tuple[str, int]]
    tile: int | None = None
    solver: str = "auto"


def example_batch(rows: int, length: int, packed: bool, device: torch.device | str = "cpu") -> Batch:
    """A micro-batch like those of training, every position learned; packed rows hold two documents."""
    positions = torch.arange(length, device=device)
    if packed and length > 1:
        positions = torch.where(positions < length // 2, positions, positions - length // 2)
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    return {"input_ids": ids, "position_ids": positions.repeat(rows, 1), "targets": ids.clone()}


def plan_memory(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                processes: int) -> MemoryPlan | None:
    """Plan a step's memory from shapes alone; None where the architecture cannot run without data.

    Raises:
        BudgetUnmet: no plan fits the budget.
    """
    def again(changed: Experiment, regions: bool, tile: int | None) -> Planner:
        return study_experiment(changed, teacher, student, processes, regions, tile)

    try:
        return describe(*choose(experiment, again, processes=processes))
    except (RuntimeError, NotImplementedError):  # some mixtures of experts look at their data
        return None


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
    schedule: Schedule
    tile: int | None
    keep_all: int


class _Unmet(Exception):
    """No schedule fits.

    Attributes:
        error: what is possible.
        least: the plan with the least peak.
    """

    def __init__(self, error: BudgetError, least: Schedule) -> None:
        self.error, self.least = error, least


def choose(experiment: Experiment, again: Again, first: Callable[[bool, int | None], Planner] | None = None,
           processes: int = 1) -> Chosen:
    """What was learned of the experiment's step, its schedule, and the loss's tile.

    Args:
        again: studies an experiment, with or without a schedule for its blocks in view, at a tile of so many bytes.
        first: the same for this experiment, if it can be done better.
        processes: that train together.

    Raises:
        BudgetUnmet: no plan fits.
    """
    def attempt(changed: Experiment) -> _Trial:
        return _Trial(changed.memory.bytes, lambda regions, tile: again(changed, regions, tile))

    try:
        return _choose(experiment.memory.bytes, first or (lambda regions, tile: again(experiment, regions, tile)))
    except NotExact as error:
        raise UserError("memory.solver", str(error), value=experiment.memory.solver,
                        way_out="use `auto`, which says how much a better schedule could save at most (the gap, "
                                "in the plan), or a model of smaller blocks") from error
    except _Unmet as unmet:
        raise refuse(experiment, unmet.error, *named_parts(unmet.least), attempt, processes) from unmet.error


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


def study_experiment(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                     processes: int, regions: bool, tile: int | None = None) -> Planner:
    """Learn what a step needs from shapes alone: models, batch and optimizer are made without data.

    Without `regions` the model is to run as it is. `tile` is of the loss.

    Raises:
        UserError: a layer cannot be quantized, or what is cached of the teacher cannot serve the student.
        RuntimeError, NotImplementedError: the architecture cannot run without data.
    """
    sharded = is_sharded(experiment, processes)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(place):
        made = _Made.of(experiment, teacher, student, sharded, place, tile)
        small, large = made.model, made.teacher
        how: dict[str, Any] = {"residency": _shared(experiment, small, large, processes, place)} if sharded else {
            "optimizer": experiment.optimizer.build(small), "in_backward": in_backward(experiment),
            "accumulate": gradients_stay(experiment, processes)}
    return study(small.train(), made.batch, loss=made.loss_of, others=[large] if large is not None else [],
                 device=experiment.memory.device, reserved=reserved(experiment, processes, place), regions=regions,
                 solver=experiment.memory.solver, cache=plans_cache(experiment), **how)


def plans_cache(experiment: Experiment) -> Path:
    """Where what is found for a block is kept, once there is the folder of the cache: a dry run makes none."""
    return Path(experiment.run.cache) / "plans"


def without_gradient(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig
                     ) -> set[str] | None:
    """Names of the student's parameters that its loss does not depend on, found from shapes alone.

    None where the architecture cannot run without data, of which nothing is planned either.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device(place):
        made = _Made.of(experiment, teacher, student, False, place, None)
    made.model.train()
    try:
        idle = off_the_path(made, mode)
    except Exception:  # of every kind: code of each model's own
        return None
    return {name for name, parameter in made.model.named_parameters() if id(parameter) in idle}


@dataclass(frozen=True)
class _Made:
    """A step's models and batch, made in a mode without data."""

    model: nn.Module
    teacher: nn.Module | None
    batch: Batch
    loss_of: Callable[[nn.Module, Batch], torch.Tensor]

    @classmethod
    def of(cls, experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, sharded: bool,
           place: str, tile: int | None) -> _Made:
        check_sizes(experiment, student, teacher)
        small, large = empty_student(experiment, student), resident_teacher(experiment, teacher)
        attach_projections(experiment, small, teacher)
        batch = example_batch(experiment.training.micro_batch, experiment.data.sequence_length,
                              experiment.data.packing, place)
        objective, precision = experiment.objective.build(teacher is not None), experiment.precision.build(place)
        common = sizes(student, teacher, known_size(experiment), apart_size(experiment))

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            distillation = Distillation(objective, model, live(large), tile=tile, common=common,
                                        intermediate=build_intermediate(experiment, model, live(large)),
                                        balancing=balancing_weight(experiment.objective, student))
            return loss_of_batch(distillation, precision, model, batch, engine_casts=sharded,
                                 teacher_targets=example_targets(experiment, teacher, batch, large))[0]

        return cls(small, large, batch, loss)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.model, batch)


def _shared(experiment: Experiment, student: nn.Module, teacher: nn.Module | None, processes: int, place: str
            ) -> Residency:
    """What a rank holds of models whose weights are gathered when they are used, which then get the dtype of that."""
    held = rank_residency(
        experiment, student, teacher, processes, place == "cuda" or experiment.memory.device is not None
    )
    for parameter in (*student.parameters(), *(() if teacher is None else teacher.parameters())):
        parameter.data = parameter.data.to(COMPUTE[experiment.precision.dtype])
    return held


def reserved(experiment: Experiment, processes: int, device: str) -> dict[str, int]:
    """Bytes held outside of what one micro-batch shows.

    Where batches are made on the device itself, the other micro-batches of a step; and what is to be left free.
    """
    free = {} if experiment.memory.reserve is None else {"reserve": parse_bytes(experiment.memory.reserve)}
    more = experiment.training.batch_size // (experiment.training.micro_batch * processes) - 1
    one = example_batch(experiment.training.micro_batch, experiment.data.sequence_length, experiment.data.packing)
    bytes_ = sum(tensor.nbytes for tensor in one.values()) + 24 * experiment.training.micro_batch  # three more
    return free | ({"batch": more * bytes_} if more > 0 and device == "cpu" else {})


def describe(planner: Planner, chosen: Schedule, tile: int | None, keep_all: int) -> MemoryPlan:
    """A schedule as plain data."""
    moment, parts = named_parts(chosen)
    points, marks = chosen.curve()
    drawn = curve(SimpleNamespace(timeline=[count for _, count in points], marks=marks))
    return MemoryPlan(
        budget=chosen.budget, peak=chosen.peak, keep_all=keep_all, moment=moment, parts=parts,
        recomputed=chosen.overhead, gap=chosen.gap, blocks=chosen.blocks(), unplanned=chosen.fallbacks,
        curve=[(int(at), int(count)) for at, count in thinned(drawn, POINTS)],
        marks=[(name, int(position)) for name, position in drawn.marks], tile=tile,
        solver=chosen.solver)


def named_parts(chosen: Schedule) -> tuple[str, dict[str, int]]:
    """When the peak of a schedule is, and its bytes by what they are."""
    moment, parts = chosen.parts()
    return moment, {"teacher" if name == "others" else name: count for name, count in parts.items()}

"""The budget of bytes: what a training step of an experiment needs, and the plan that makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.distillation.step import Distillation
from strategies.memory.residency import Residency
from strategies.rematerialization.plan import BudgetError
from strategies.rematerialization.plan import Plan as Schedule
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.rematerialize import study
from trainer.data.batches import Batch
from trainer.errors import UserError
from trainer.experiment.tree import Experiment
from trainer.inside import attach_projections, build_inside
from trainer.metrics import readable
from trainer.models import student_of
from trainer.precision import DTYPES as COMPUTE
from trainer.shares import gradients_stay, in_backward, is_sharded
from trainer.step_loss import loss_of_batch
from trainer.targets import example_targets, held_of, live, resident_teacher, sizes

POINTS = 600  # of a curve that is kept for the picture
LEAST_TILE = 2**20  # bytes of logits at a time in the loss, where bytes are short


class BudgetUnmet(UserError):
    """A budget that no plan meets; the command ends with exit code 3."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step in each process, and what is recomputed so that they fit.

    Attributes:
        budget: bytes allowed; None where there is no limit.
        peak: predicted bytes at the peak.
        keep_all: predicted bytes at the peak when nothing is recomputed.
        moment: when the peak is.
        parts: bytes at the peak by what they are; their sum is the peak.
        recomputed: recomputation as a share of the time of the blocks' forward and backward, predicted.
        gap: share of that time which a better schedule could save at most, proven.
        blocks: for every block, how it runs: bytes kept, seconds recomputed, and the segment it is in.
        unplanned: blocks that run as they are because they could not be captured, and why.
        curve: planned bytes over one micro-batch's step, as (position, bytes).
        marks: (phase, position) where phases begin.
        tile: bytes of logits at a time in the loss; None for the device's usual.
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


def example_batch(rows: int, length: int, packed: bool, device: torch.device | str = "cpu") -> Batch:
    """A micro-batch like those of training, every position learnt; packed rows hold two documents."""
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
        return describe(*choose(experiment, again))
    except (RuntimeError, NotImplementedError):  # some mixtures of experts look at their data
        return None


Again = Callable[[Experiment, bool, int | None], Planner]


def choose(experiment: Experiment, again: Again, first: Callable[[bool, int | None], Planner] | None = None
           ) -> tuple[Planner, Schedule, int | None]:
    """What was learnt of the experiment's step, its schedule, and the loss's tile.

    Where the model fits as it is, nothing is planned, with as large a tile as fits. Else the tile is the usual or the
    least one, whichever has less recomputed.

    Args:
        again: studies an experiment, with or without a schedule for its blocks in view, at a tile of so many bytes.
        first: the same for this experiment, if it can be done better.

    Raises:
        BudgetUnmet: no plan fits.
    """
    first = first or (lambda regions, tile: again(experiment, regions, tile))
    budget, planner, tile = experiment.memory.bytes, first(False, None), None
    if budget is not None and not planner.fits_as_it_is(budget):
        planner, tile = first(False, LEAST_TILE), LEAST_TILE
        spare = budget - planner.keep_all().peak
        if spare > 0:  # what is made of a tile takes up to some fifteen times its bytes where it is small
            tile = LEAST_TILE + spare // 16
            planner = first(False, tile)
    if budget is None or planner.fits_as_it_is(budget):
        schedule = planner.keep_all()
        schedule.budget = budget
        return planner, schedule, tile
    found: list[tuple[Planner, Schedule, int | None]] = []
    for tile in (None, LEAST_TILE):
        planner = first(True, tile)
        try:
            found.append((planner, planner.plan(budget), tile))
        except BudgetError as error:
            failed = error
    if not found:
        raise refuse(experiment, failed, planner.least, again) from failed
    return min(found, key=lambda one: one[1].overhead)


def study_experiment(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                     processes: int, regions: bool, tile: int | None = None) -> Planner:
    """Learn what a step needs from shapes alone: models, batch and optimizer are made without data.

    Without `regions` the model is to run as it is. `tile` is of the loss.

    Raises:
        UserError: a layer cannot be quantised.
        RuntimeError, NotImplementedError: the architecture cannot run without data.
    """
    objective, sharded = experiment.objective.build(teacher is not None), is_sharded(experiment, processes)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(place):
        small, large = student_of(experiment, student), resident_teacher(experiment, teacher)
        attach_projections(experiment, small, teacher)
        batch = example_batch(experiment.training.micro_batch, experiment.data.sequence_length,
                              experiment.data.packing, place)
        how: dict[str, Any] = {"residency": _shared(experiment, small, large, processes, place)} if sharded else {
            "optimizer": experiment.optimizer.build(small), "in_backward": in_backward(experiment),
            "accumulate": gradients_stay(experiment, processes)}
    precision = experiment.precision.build(place)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        distillation = Distillation(objective, model, live(large), tile=tile, common=sizes(student, teacher),
                                    inside=build_inside(experiment, model, live(large)))
        return loss_of_batch(distillation, precision, model, batch, engine_casts=sharded,
                             taught=example_targets(experiment, teacher, batch, large))[0]

    return study(small.train(), batch, loss=loss, others=[large] if large is not None else [],
                 device=experiment.memory.device, reserved=reserved(experiment, processes, place), regions=regions,
                 **how)


def _shared(experiment: Experiment, student: nn.Module, teacher: nn.Module | None, processes: int, place: str
            ) -> Residency:
    """What a rank holds of models whose weights are gathered when they are used, which then get the dtype of that."""
    held = held_of(experiment, student, teacher, processes, place == "cuda" or experiment.memory.device is not None)
    for parameter in (*student.parameters(), *(() if teacher is None else teacher.parameters())):
        parameter.data = parameter.data.to(COMPUTE[experiment.precision.dtype])
    return held


def reserved(experiment: Experiment, processes: int, device: str) -> dict[str, int]:
    """Bytes held outside of what one micro-batch shows.

    Where batches are made on the device itself, the other micro-batches of a step.
    """
    more = experiment.training.batch_size // (experiment.training.micro_batch * processes) - 1
    one = example_batch(experiment.training.micro_batch, experiment.data.sequence_length, experiment.data.packing)
    bytes_ = sum(tensor.nbytes for tensor in one.values()) + 16 * experiment.training.micro_batch  # rows and bytes
    return {"batch": more * bytes_} if more > 0 and device == "cpu" else {}


def describe(planner: Planner, chosen: Schedule, tile: int | None) -> MemoryPlan:
    """A schedule as plain data."""
    moment, parts = named_parts(chosen)
    curve, marks = chosen.curve()
    step = max(1, len(curve) // POINTS)
    return MemoryPlan(
        budget=chosen.budget, peak=chosen.peak, keep_all=planner.keep_all().peak, moment=moment, parts=parts,
        recomputed=chosen.overhead, gap=chosen.gap, blocks=chosen.blocks(), unplanned=chosen.fallbacks,
        curve=[(begin, max(count for _, count in curve[begin:begin + step])) for begin in range(0, len(curve), step)],
        marks=list(marks), tile=tile)


def named_parts(chosen: Schedule) -> tuple[str, dict[str, int]]:
    """When the peak of a schedule is, and its bytes by what they are."""
    moment, parts = chosen.parts()
    return moment, {"teacher" if name == "others" else name: count for name, count in parts.items()}


def refuse(experiment: Experiment, error: BudgetError, least: Schedule,
           again: Again) -> BudgetUnmet:
    """The message for a budget that cannot be met: what is possible, where it goes, and changes that would fit.

    Args:
        least: the plan with the least peak.
        again: studies a changed experiment.
    """
    moment, parts = named_parts(least)
    lines = [f"a training step cannot be made to fit: the least that any plan found needs is {readable(error.least)} "
             f"({error.least:,} bytes), and none can need less than {readable(error.bound)}"]
    lines += [f"  the largest parts then, at the peak ({moment}):"]
    lines += [f"    {name:<28} {count:>16,} bytes  {readable(count)}"
              for name, count in sorted(parts.items(), key=lambda part: -part[1]) if count][:7]
    fitting = list(_fitting(experiment, error.budget, again))[:4]
    memory, named = experiment.memory, experiment.memory.budget is None
    ways = [*fitting, f"memory.budget={error.least}" if not named else "a larger memory.device"]
    if not fitting:
        ways.append("a smaller model")
    return BudgetUnmet("memory.device" if named else "memory.budget", "\n".join(lines),
                       value=f"{memory.device}, nine tenths of it" if named else memory.budget,
                       way_out="; or ".join(ways))


def _fitting(experiment: Experiment, budget: int, again: Again) -> Iterator[str]:
    """Changes that fit, cheapest first: what is learnt stays the same, or nearly, or sequences are shorter."""
    found: set[str] = set()
    for text, changed in _changes(experiment):
        key = text.partition("=")[0]
        if key in found:
            continue  # the largest micro-batch that fits is the best one
        try:
            planner = again(changed, True, LEAST_TILE)
            if planner.least_bound > budget:
                continue
            plan = planner.plan(budget)
        except (BudgetError, UserError):
            continue
        found.add(key)
        yield f"{text} (then {readable(plan.peak)}, {plan.overhead:.0%} recomputed)"


def _changes(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    def with_(node: str, **values: Any) -> Experiment:
        return experiment.model_copy(update={node: getattr(experiment, node).model_copy(update=values)})

    micro = experiment.training.micro_batch
    for smaller in [size for size in range(micro - 1, 0, -1) if micro % size == 0]:
        yield f"training.micro_batch={smaller}", with_("training", micro_batch=smaller)
    if experiment.precision.dtype == "fp32":
        yield "precision.dtype=bf16", with_("precision", dtype="bf16")
    if experiment.teacher is not None and experiment.teacher.dtype == "float32":
        yield "teacher.dtype=bfloat16", with_("teacher", dtype="bfloat16")
    for shorter in (experiment.data.sequence_length // 2, experiment.data.sequence_length // 4):
        if shorter > 1:
            yield f"data.sequence_length={shorter}", with_("data", sequence_length=shorter)


"""What a training step of an experiment needs, learned from shapes alone, and its memory as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.distillation.step import Distillation
from strategies.memory.external import held_besides
from strategies.memory.plot import curve, thinned
from strategies.memory.residency import Residency
from strategies.memory.units import parse_bytes
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.step_trace import off_the_path
from strategies.rematerialization.recompute_plan import RecomputePlan
from strategies.rematerialization.rematerialize import Refuted, study
from trainer.data.batches import Batch
from trainer.data.tokenizers import apart_size, known_size
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Run
from trainer.models.build import empty_student
from trainer.models.router_balance import balancing_weight
from trainer.teacher.intermediate_losses import attach_projections, build_intermediate
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.target_cache import check_sizes, example_targets, live, rank_residency, resident_teacher, sizes

POINTS = 600  # of a curve that is kept for the picture
NONE: Mapping[str, Refuted] = MappingProxyType({})


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
    return {"input_ids": ids, "position_ids": positions.repeat(rows, 1), "targets": ids.clone(),
            "learned": torch.arange(rows * length, device=device)}


def study_experiment(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                     topology: Topology, regions: bool, tile: int | None = None, refuted: Mapping[str, Refuted] = NONE
                     ) -> Planner:
    """Learn what a step needs from shapes alone: models, batch and optimizer are made without data.

    Args:
        regions: whether blocks are planned inside; without, the model is to run as it is.
        tile: bytes of logits at a time in the loss.
        refuted: blocks that are not what their captured graphs say, by name.

    Raises:
        UserError: a layer cannot be quantized, or what is cached of the teacher cannot serve the student.
        RuntimeError, NotImplementedError: the architecture cannot run without data.
    """
    setup = RankSetup.of(experiment, topology)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    held = reserved(experiment, topology, place)
    if place == "cuda" and experiment.memory.device is None:
        held["held besides"] = held_besides(torch.device(place), [])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(place):
        made = _Made.of(experiment, teacher, student, setup.is_sharded, place, tile)
        small, large = made.model, made.teacher
        how: dict[str, Any] = {
            "optimizer": experiment.optimizer.build(small), "in_backward": setup.in_backward,
            "accumulate": setup.gradients_stay}
        if setup.is_sharded:
            how = {"residency": _shared(setup, small, large, place == "cuda" or experiment.memory.device is not None)}
    return study(small.train(), made.batch, loss=made.loss_of, others=[large] if large is not None else [],
                 device=experiment.memory.device, reserved=held, regions=regions,
                 measure=experiment.memory.device is None and topology.ranks == 1, refuted=refuted,
                 solver=experiment.memory.solver, cache=plans_cache(experiment.run), **how)


def plans_cache(run: Run) -> Path:
    """Where what is found for a block is kept, once there is the folder of the cache: a dry run makes none."""
    return Path(run.cache) / "plans"


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
        settings = experiment.teacher if experiment.uses_teacher else None
        check_sizes(settings, student, teacher)
        small, large = empty_student(experiment.form, student), resident_teacher(settings, teacher)
        attach_projections(experiment.objective, experiment.seed, small, teacher)
        batch = example_batch(experiment.training.micro_batch, experiment.data.sequence_length,
                              experiment.data.packing, place)
        objective, precision = experiment.objective.build(teacher is not None), experiment.precision.build(place)
        common = sizes(student, teacher, known_size(experiment.data.tokenizer, experiment.with_weights),
                       apart_size(experiment.teacher, experiment.student, experiment.objective.divergence.name))

        temperature = experiment.objective.divergence.temperature

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            distillation = Distillation(objective, model, live(large), tile=tile, common=common,
                                        intermediate=build_intermediate(experiment.objective, model, live(large)),
                                        balancing=balancing_weight(experiment.objective, student))
            return loss_of_batch(distillation, precision, model, batch, engine_casts=sharded,
                                 teacher_targets=example_targets(experiment.teacher, temperature, teacher, batch,
                                                                 large))[0]

        return cls(small, large, batch, loss)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.model, batch)


def _shared(setup: RankSetup, student: nn.Module, teacher: nn.Module | None, on_gpu: bool) -> Residency:
    """What a rank holds of models whose weights are gathered when they are used, which then get the dtype of that."""
    held = rank_residency(setup, student, teacher, on_gpu)
    for parameter in (*student.parameters(), *(() if teacher is None else teacher.parameters())):
        parameter.data = parameter.data.to(setup.compute)
    return held


def reserved(experiment: Experiment, topology: Topology, device: str) -> dict[str, int]:
    """Bytes held outside of what one micro-batch shows.

    Where batches are made on the device itself, the other micro-batches of a step; and what is to be left free.
    """
    free = {} if experiment.memory.reserve is None else {"reserve": parse_bytes(experiment.memory.reserve)}
    more = experiment.training.batch_size // (experiment.training.micro_batch * topology.data_parallel) - 1
    one = example_batch(experiment.training.micro_batch, experiment.data.sequence_length, experiment.data.packing)
    rows = 24 * experiment.training.micro_batch  # their numbers, lengths and bytes
    bytes_ = sum(tensor.nbytes for name, tensor in one.items() if name != "learned") + rows
    return free | ({"batch": more * bytes_} if more > 0 and device == "cpu" else {})


def describe(planner: Planner, chosen: RecomputePlan, tile: int | None, keep_all: int) -> MemoryPlan:
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


def named_parts(chosen: RecomputePlan) -> tuple[str, dict[str, int]]:
    """When the peak of a schedule is, and its bytes by what they are."""
    moment, parts = chosen.parts()
    return moment, {"teacher" if name == "others" else name: count for name, count in parts.items()}

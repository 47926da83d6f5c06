"""Studies the memory of an experiment's training step from shapes alone, and describes it as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.adapters.low_rank import base_of
from strategies.common.frozen_base import has_adapters
from strategies.distillation.step import Distillation
from strategies.memory.external import held_besides
from strategies.memory.plot import curve, thinned
from strategies.memory.residency import Residency
from strategies.memory.units import parse_bytes
from strategies.rematerialization.capture.compile_region import quiet
from strategies.rematerialization.capture.fake_tensors import FakeItemMode
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.costs import Device
from strategies.rematerialization.price.step_trace import Shared, off_the_path
from strategies.rematerialization.price.unit_seconds import unit_seconds
from strategies.rematerialization.recompute_plan import RecomputePlan
from strategies.rematerialization.rematerialize import Refuted, study
from strategies.sharding.zero import ask_for_gradients
from trainer.data.batches import Batch, example_batch
from trainer.data.tokenizers import apart_size, known_size
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Run
from trainer.models.build import empty_student
from trainer.models.router_balance import balancing_weight
from trainer.planning.planned_teachers import PlannedOthers, together
from trainer.teacher.exit_losses import attach_parts, build_exits
from trainer.teacher.intermediate_losses import build_intermediate
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.resident_teacher import check_sizes, example_targets, live, rank_residency, resident_teacher, sizes

POINTS = 600  # at most, of a memory curve stored for plotting
NONE: Mapping[str, Refuted] = MappingProxyType({})


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step in each process, and what is recomputed to make it fit.

    Attributes:
        budget: bytes allowed; None where there is no limit.
        peak: predicted peak memory, in bytes.
        keep_all: predicted peak without a budget, in bytes: nothing recomputed, the loss in tiles of default size.
        moment: when the peak occurs.
        parts: bytes at the peak by kind; they sum to the peak.
        recomputed: predicted recomputation time as a share of the blocks' forward and backward time.
        gap: proven upper bound on the share of that time that a better schedule could save.
        blocks: how each block runs: bytes kept, seconds recomputed, and the segment it belongs to.
        unplanned: blocks that could not be captured as a graph and run unchanged, with the reason.
        curve: planned bytes over the step of one micro-batch, as (position, bytes).
        marks: (phase, position) where each phase begins.
        tile: bytes of a tile of logits in the loss; None for the device's default.
        solver: which solver found the blocks' schedules; "exact" if each is a proven optimum for its bytes and its
            peak.
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


class StepStudy:
    """Studies the memory of a step from shapes alone: models, batch and optimizer are created on fake tensors.

    Args:
        experiment: the experiment.
        teacher, student: configurations of its models.
        topology: the ranks that share a step.
        refuted: blocks that do not compute what their captured graphs compute, by name.
        brief: whether only peaks are asked for, and not what there is at each moment of the optimizer's step.
    """

    def __init__(self, experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                 topology: Topology, refuted: Mapping[str, Refuted] = NONE, brief: bool = False) -> None:
        self.experiment, self.topology, self.refuted = experiment, topology, refuted
        self._configs = teacher, student
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._shared = Shared(brief=brief)

    def __call__(self, regions: bool, tile: int | None = None) -> Planner:
        """Study the step.

        Args:
            regions: whether to capture the blocks as regions whose schedules can be planned; if not, the model runs
                unchanged.
            tile: bytes of a tile of logits in the loss; None for the device's default.

        Raises:
            UserError: a layer cannot be quantized, or cached teacher targets do not fit the student's vocabulary.
            RuntimeError, NotImplementedError: the architecture cannot run without data.
        """
        experiment, (made, how) = self.experiment, self._made
        planner = study(
            made.model.train(), made.batch, loss=lambda model, batch: made.loss_of(model, batch, tile),
            others=[made.teacher] if made.teacher is not None else [], device=experiment.memory.device, regions=regions,
            measure=experiment.memory.device is None and self.topology.ranks == 1, refuted=self.refuted,
            solver=experiment.memory.solver, cache=plans_cache(experiment.run), shared=self._shared, alike=self._alike,
            **how)
        planner.unchanged = experiment.memory.compile is not True
        return planner

    @property
    def _alike(self) -> bool:
        """Whether nothing but the next block reads what a block returns, and the loss nothing inside of blocks."""
        objective, student = self.experiment.objective, self._configs[1]
        read = (objective.features, objective.relations, objective.values, objective.attention_maps,
                objective.early_exits, balancing_weight(objective, student))
        return self.experiment.data.is_language and all(part is None for part in read)

    def unit_seconds(self, device: Device, units: Callable[[str, nn.Module], Sequence[tuple[str, ...]]]
                     ) -> dict[str, dict[tuple[str, ...], tuple[float, float]]]:
        """Seconds (forward, backward) of each unit of `student` and `teacher` in a micro-batch, nothing recomputed.

        Args:
            units: gives the units of one of them, by its name.
        """
        made, _ = self._made
        models = {name: model for name, model in (("teacher", self.teacher), ("student", made.model)) if model}
        with self._mode, FakeItemMode(), quiet("torch._subclasses.fake_tensor"):
            return unit_seconds(lambda: made.loss(made.batch), models,
                                {name: units(name, model) for name, model in models.items()}, device)

    @property
    def student(self) -> nn.Module:
        """The student, of fake tensors."""
        return self._made[0].model

    @property
    def teacher(self) -> nn.Module | None:
        """What of the teachers is resident beside the student; None if that is nothing, or part of the student."""
        return None if self.experiment.teacher_is_base else self._made[0].teacher

    @cached_property
    def _made(self) -> tuple[_Made, dict[str, Any]]:
        """The models and the batch, and what else takes memory beside them."""
        experiment, setup = self.experiment, RankSetup.of(self.experiment, self.topology)
        place = "cuda" if torch.cuda.is_available() else "cpu"
        held = reserved(experiment, self.topology, place)
        if place == "cuda" and experiment.memory.device is None:
            held["held besides"] = held_besides(torch.device(place), [])
        with self._mode, torch.device(place):
            made = _Made.of(experiment, *self._configs, setup.is_sharded, place)
            if experiment.student.sparsity is not None:
                ranks = self.topology.data_parallel if setup.is_sharded else 1
                held["masks"] = sum(experiment.student.sparsity.bytes_in_training(made.model)) // ranks
            how: dict[str, Any] = {"reserved": held}
            if setup.engine == "zero" and setup.sharding.zero_stage == 3:
                ask_for_gradients(made.model)
            if setup.is_sharded:
                on_gpu = place == "cuda" or experiment.memory.device is not None
                how["residency"] = _shared(setup, made.model, made.teacher, on_gpu)
            else:
                how |= {"optimizer": experiment.optimizer.build(made.model), "in_backward": setup.in_backward,
                        "accumulate": setup.gradients_stay}
        return made, how


def plans_cache(run: Run) -> Path:
    """The folder that caches what is found for each block. A dry run does not create the cache folder above it."""
    return Path(run.cache) / "plans"


def without_gradient(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig
                     ) -> set[str] | None:
    """Names of the student's parameters that its loss does not depend on, found from shapes alone.

    None where the architecture cannot run without data; then no step is planned either.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device(place):
        made = _Made.of(experiment, teacher, student, False, place)
    made.model.train()
    try:
        idle = off_the_path(made, mode)
    except Exception:  # model code can raise anything
        return None
    return {name for name, parameter in made.model.named_parameters() if id(parameter) in idle}


@dataclass(frozen=True)
class _Made:
    """The models and the batch of a step, created under `FakeTensorMode`."""

    model: nn.Module
    teacher: nn.Module | None
    batch: Batch
    loss_of: Callable[[nn.Module, Batch, int | None], torch.Tensor]

    @classmethod
    def of(cls, experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, sharded: bool,
           place: str) -> _Made:
        settings = experiment.teacher if experiment.uses_teacher else None
        language = experiment.data.is_language
        tokens = known_size(experiment.data.tokenizer, experiment.with_weights) if language else None
        if language:
            check_sizes(settings, student, teacher, tokens)
        small = empty_student(experiment.form, student)
        large = base_of(small) if experiment.teacher_is_base else resident_teacher(settings, teacher)
        attach_parts(experiment.objective, experiment.seed, small, teacher)
        batch = example_batch(experiment.data, experiment.training.micro_batch, place)
        objective, precision = experiment.objective.build(teacher is not None), experiment.precision.build(place)
        common = None if not language else sizes(student, teacher, tokens, apart_size(
            experiment.teacher, experiment.student, experiment.objective.divergence.name))
        shapes: dict[str, Any] = {} if language else {"shapes": (None, None)}
        temperature, others = experiment.objective.divergence.temperature, PlannedOthers.of(experiment, student)

        def loss(model: nn.Module, batch: Batch, tile: int | None) -> torch.Tensor:
            distillation = Distillation(objective, model, live(large), tile=tile, common=common, **shapes,
                                        intermediate=build_intermediate(experiment.objective, model, live(large)),
                                        balancing=balancing_weight(experiment.objective, student),
                                        others=others.judges, exits=build_exits(experiment.objective, model))
            return loss_of_batch(distillation, precision, model, batch, engine_casts=sharded,
                                 teacher_targets=example_targets(experiment.teacher, temperature, teacher, batch,
                                                                 large),
                                 others_targets=others.targets and others.targets(batch))[0]

        on_gpu = place == "cuda" or experiment.memory.device is not None
        turns = settings is not None and settings.take_turns and on_gpu
        return cls(small, together(large, others.resident, turns), batch, loss)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.model, batch, None)


def _shared(setup: RankSetup, student: nn.Module, teacher: nn.Module | None, on_gpu: bool) -> Residency:
    """The residency of a rank of sharded models: what it holds, and what it gathers for use.

    Casts the models' parameters to the dtype in which they are gathered: half precision, if they compute in that.
    """
    held = rank_residency(setup, student, teacher, on_gpu)
    if setup.compute is torch.float32 and has_adapters(student):  # whose base may be held in bfloat16
        return held
    for parameter in (*student.parameters(), *(() if teacher is None else teacher.parameters())):
        parameter.data = parameter.data.to(setup.compute)
    return held


def reserved(experiment: Experiment, topology: Topology, device: str) -> dict[str, int]:
    """Bytes that the study of a single micro-batch does not see, by name.

    These are `memory.reserve`, and on the CPU, where batches are in the same memory, the step's other micro-batches.
    """
    free = {} if experiment.memory.reserve is None else {"reserve": parse_bytes(experiment.memory.reserve)}
    more = experiment.training.batch_size // (experiment.training.micro_batch * topology.data_parallel) - 1
    one = example_batch(experiment.data, experiment.training.micro_batch)
    rows = 24 * experiment.training.micro_batch  # row numbers, lengths and byte counts: three int64 per row
    bytes_ = sum(tensor.nbytes for tensor in one.values()) + rows
    return free | ({"batch": more * bytes_} if more > 0 and device == "cpu" else {})


def describe(planner: Planner, chosen: RecomputePlan, tile: int | None, keep_all: int) -> MemoryPlan:
    """Describe a schedule as plain data.

    Args:
        tile: bytes of a tile of logits in the loss; None for the device's default.
        keep_all: peak memory without a budget, in bytes.
    """
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
    """When the peak of a schedule occurs, and the bytes at the peak by kind."""
    moment, parts = chosen.parts()
    return moment, {"teacher" if name == "others" else name: count for name, count in parts.items()}

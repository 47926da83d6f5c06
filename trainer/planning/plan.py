"""The plan of a run: all decisions that follow from an experiment, made from shapes alone, without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from strategies.distillation.losses.tiled_loss import tile_rows
from strategies.export.hf.transformers_folder import weight_files
from strategies.export.sizes import exported_bytes
from strategies.memory.ledger import Ledger, loss_bytes, saved_activation_bytes
from strategies.rematerialization.rematerialize import Refuted
from strategies.sharding.zero import bucket_numel
from trainer.data.batches import example_batch, model_inputs, positions_of
from trainer.data.tokenizers import apart_size, known_size
from trainer.distributed.rank_memory import RankSetup
from trainer.distributed.topology import Topology
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.nodes import Optimizer, Training, divisors
from trainer.models.build import DTYPES, count_parameters, empty_student, export_skeleton
from trainer.models.full_precision import tell_share
from trainer.models.model_origin import skeleton
from trainer.models.router_balance import balancing_note
from trainer.planning.step_memory import MemoryPlan
from trainer.planning.step_plan import StepPlan, plan_step
from trainer.teacher.exit_losses import attach_parts
from trainer.teacher.resident_teacher import live, rank_residency, resident_teacher

NOMINAL_STEPS = 1000  # run length assumed for the learning-rate curve while the length of the data is unknown


@dataclass(frozen=True)
class Plan:
    """All decisions for a run, made once and passed to the code that carries them out.

    Attributes:
        topology: the ranks of the run and how they share the work.
        batch_size: sequences per optimizer step over all ranks.
        micro_batch: sequences per forward pass on one rank.
        accumulation: forward passes per optimizer step on each rank.
        tokens_per_step: positions per optimizer step, padding included.
        steps: optimizer steps; None while the length of the data is unknown.
        learning_rates: (step, learning rate) at evenly spaced steps; over `NOMINAL_STEPS` while `steps` is None.
        precision: number format of forward and backward.
        parameters: parameter count by model, `student` and `teacher`.
        student_bytes: bytes of the student's weight file: integers, scales, and weights left in full precision.
        teacher_bytes: bytes of the teacher's weight files, for comparison with the student's, here and in the report.
        ledger: resident bytes per rank, by part.
        sharding: how the student is sharded, in words.
        bucket: size of a communication bucket: bytes for DDP, elements for ZeRO; None where there are no buckets.
        full_precision: which weights of a quantized student stay in full precision, in words; else None.
        balancing: whether the routers of a mixture of experts are balanced, in words; None if there is nothing to say.
        step: how the step of a micro-batch runs, and the bytes per rank at its peak; None where the architecture cannot
            run without data, or nothing is trained.
    """

    topology: Topology
    batch_size: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    steps: int | None
    learning_rates: list[tuple[int, float]]
    precision: str
    parameters: dict[str, int]
    student_bytes: int
    teacher_bytes: int
    ledger: Ledger
    sharding: str = "none"
    bucket: int | None = None
    full_precision: str | None = None
    balancing: str | None = None
    step: StepPlan | None = field(default=None, repr=False)

    @property
    def memory(self) -> MemoryPlan | None:
        """The memory plan of a step, as plain data."""
        return None if self.step is None else self.step.memory

    @property
    def notes(self) -> list[str]:
        """Messages to show to the user before training."""
        return [note for note in (self.full_precision, self.balancing) if note is not None]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `plan.json`."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "step"}
        return {**own, "topology": self.topology.to_dict(),
                "ledger": {**asdict(self.ledger), "total": self.ledger.total},
                "memory": None if self.memory is None else asdict(self.memory),
                "model_state": self.ledger.model_state}


class Plans:
    """Makes plans, and caches the expensive part: the study of a training step.

    A run is planned more than once: first before the data is read, when its length is unknown and a teacher that is
    still to be trained has no weights, and again afterwards. Both plans have the same step.
    """

    def __init__(self) -> None:
        self._steps: dict[str, StepPlan | None] = {}

    def resolve(self, experiment: Experiment, topology: Topology, teacher: PretrainedConfig | None,
                student: PretrainedConfig, rows: int | None = None, done: tuple[int, int] = (0, 0)) -> Plan:
        """Plan an experiment from its models' configurations.

        Args:
            rows: the number of training rows, if known.
            done: steps done already, and the rows they have taken.

        Raises:
            BudgetUnmet: no plan fits the budget.
            UserError: the batch cannot be divided among the ranks, or a layer cannot be quantized.
        """
        return replace(_around(experiment, topology, teacher, student, rows, done),
                       step=self.step(experiment, topology, teacher, student))

    def step(self, experiment: Experiment, topology: Topology, teacher: PretrainedConfig | None,
             student: PretrainedConfig) -> StepPlan | None:
        """The planned step of an experiment, from the cache if possible; raises what `plan_step` raises."""
        if experiment.training.steps == 0:
            return None
        key = _studied(experiment, topology, teacher, student)
        if key not in self._steps:
            self._steps[key] = plan_step(experiment, topology, teacher, student)
        return self._steps[key]

    def without(self, plan: Plan, experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig,
                refuted: Mapping[str, Refuted]) -> Plan:
        """Plan the step again without the captured graphs that were found not to compute what their blocks do.

        Args:
            refuted: those blocks, by name, each with the reason.
        """
        key = _studied(experiment, plan.topology, teacher, student)
        self._steps[key] = plan_step(experiment, plan.topology, teacher, student, refuted)
        return replace(plan, step=self._steps[key])


STUDIED = {"data": {"sequence_length", "packing", "task", "images", "text_pair"},
           "student": {"quantization", "adapter", "sparsity"},
           "teacher": {"dtype", "targets", "others", "take_turns"},
           "training": {"batch_size", "micro_batch", "clip"}, "optimizer": True, "precision": True,
           "sharding": True, "memory": True, "objective": True}
# Keys that saving adds to a configuration, and special token ids: the memory of a step does not depend on them.
LATER = {"_name_or_path", "architectures", "transformers_version", "dtype", "bos_token_id", "eos_token_id",
         "pad_token_id"}


def _studied(experiment: Experiment, topology: Topology, *configs: PretrainedConfig | None) -> str:
    """The cache key of a step: everything that its memory depends on, as JSON."""
    shapes = [None if config is None else {
        key: value for key, value in config.to_dict().items() if key not in LATER} for config in configs]
    sizes = (None, None) if not experiment.data.is_language else (
        known_size(experiment.data.tokenizer, experiment.with_weights),
        apart_size(experiment.teacher, experiment.student, experiment.objective.divergence.name))
    return json.dumps([experiment.model_dump(mode="json", include=STUDIED), topology.to_dict(), shapes, sizes,
                       experiment.teacher_is_base], sort_keys=True, default=str)


def _around(experiment: Experiment, topology: Topology, teacher: PretrainedConfig | None, student: PretrainedConfig,
            rows: int | None, done: tuple[int, int]) -> Plan:
    """A plan without its step."""
    training = experiment.training
    setup = RankSetup.of(experiment, topology)
    check_batch(training, experiment.optimizer, topology)
    steps = count_steps(experiment, rows, done)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        small = empty_student(experiment.form, student)
        exported, asked_bits = export_skeleton(experiment.form, student), experiment.student.quantization
        student_bytes = exported_bytes(exported, DTYPES[experiment.export.dtype])
        whole = asked_bits and tell_share(exported, asked_bits, DTYPES[experiment.export.dtype])
        parameters = {"student": count_parameters(empty_student(experiment.form.merged, student))}
        if experiment.student.adapter is not None:
            parameters["adapter"] = sum(one.numel() for one in small.parameters() if one.requires_grad)
        attach_parts(experiment.objective, experiment.seed, small, teacher)
        large = asked = resident_teacher(experiment.teacher if experiment.uses_teacher else None, teacher)
        if teacher is not None and live(asked) is None:
            large = skeleton(teacher, DTYPES[experiment.teacher.dtype], experiment.teacher.trust_remote_code, "teacher")
        if setup.is_sharded:
            setup.check_blocks(student=small, teacher=live(asked))
        bucket = {"ddp": setup.sharding.bucket_bytes, "zero": setup.bucket(bucket_numel(small))}.get(setup.engine)
        held = rank_residency(setup, small, None if experiment.teacher_is_base else asked, on_gpu=topology.on_gpu)
    ledger = Ledger.of(held, _activations(experiment, student, setup.compute),
                       _loss_bytes(experiment, student, None if asked is None else teacher, topology))
    return Plan(
        topology=topology, batch_size=training.batch_size, micro_batch=training.micro_batch,
        accumulation=training.batch_size // (training.micro_batch * topology.data_parallel),
        tokens_per_step=positions_of(experiment.data, training.batch_size), steps=steps,
        learning_rates=_learning_rates(experiment, steps), precision=experiment.precision.dtype,
        parameters=parameters | ({"teacher": count_parameters(large)} if large else {}),
        student_bytes=student_bytes,
        teacher_bytes=_file_bytes(experiment, teacher, large) if large else 0, ledger=ledger,
        sharding=experiment.sharding.words(topology.ranks), bucket=bucket, full_precision=whole,
        balancing=balancing_note(experiment.objective, student))


def _loss_bytes(experiment: Experiment, student: PretrainedConfig, teacher: PretrainedConfig | None,
                topology: Topology) -> int:
    """Bytes of the loss: of a language model in tiles of logits; classifiers have all of them, and their gradient."""
    positions = positions_of(experiment.data, experiment.training.micro_batch)
    if not experiment.data.is_language:
        return 4 * positions * student.num_labels * (2 + (teacher is not None))
    vocabularies = student.vocab_size + (0 if teacher is None else teacher.vocab_size)
    rows_at_once = tile_rows(positions, vocabularies, "cuda" if topology.on_gpu else "cpu")
    return loss_bytes(positions, student.hidden_size, vocabularies,
                      0 if experiment.student.adapter else student.vocab_size, rows_at_once)


def _file_bytes(experiment: Experiment, config: PretrainedConfig, model: nn.Module) -> int:
    """Bytes of a teacher's weight files, estimated from its parameters and their stored dtype if it is not local."""
    assert experiment.teacher is not None
    path, dtype = experiment.teacher.path, getattr(config, "dtype", None) or torch.float32
    if path is not None and (files := weight_files(Path(path))):
        return sum(file.stat().st_size for file in files)
    if path is None:
        dtype = DTYPES[experiment.as_teacher("").export.dtype]
    return count_parameters(model) * (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)).itemsize


def check_batch(training: Training, optimizer: Optimizer, topology: Topology) -> None:
    """Raise `UserError` if the batch cannot be divided evenly among the data-parallel ranks.

    Also if `optimizer.in_backward` is set and a step has several micro-batches.
    """
    replicas = topology.data_parallel
    if training.batch_size % (training.micro_batch * replicas):
        share = training.batch_size // replicas
        way_out = (f"micro_batch can be {divisors(share)}" if share * replicas == training.batch_size
                   else f"make batch_size a multiple of {replicas}")
        raise UserError("training.micro_batch", f"{replicas} processes with this micro_batch cannot share a "
                        f"batch_size of {training.batch_size} evenly", value=training.micro_batch, way_out=way_out)
    if optimizer.in_backward and training.batch_size != training.micro_batch * replicas:
        raise UserError("optimizer.in_backward", "weights that are updated in backward wait for no other micro-batch, "
                        f"and a batch_size of {training.batch_size} takes several", value=True,
                        way_out=f"set training.batch_size={training.micro_batch * replicas}, or leave it out")


def count_steps(experiment: Experiment, rows: int | None, done: tuple[int, int] = (0, 0)) -> int | None:
    """Optimizer steps of a run; None while the number of rows is unknown.

    Args:
        rows: the number of training rows.
        done: steps done already and the rows they have taken, which may be fewer than full batches where an earlier
            end of the run had a short last step.

    Raises:
        UserError: a stream is to be trained on for a number of epochs, or the warm-up is as long as the run.
    """
    training = experiment.training
    if training.steps is None and experiment.data.streaming:
        raise UserError("training.epochs", "a stream has no known length", value=training.epochs,
                        way_out="give `training.steps` instead")
    steps, (step, taken) = training.steps, done
    if steps is None and rows is not None:
        steps = step + max(0, -(-(training.seen(rows) - taken) // training.batch_size))
    if steps:
        _check_schedule(experiment, steps)
    return steps


def _check_schedule(experiment: Experiment, steps: int) -> None:
    """Raise `UserError` for a schedule whose warm-up does not end, or that begins anew after the end of the run."""
    schedule = experiment.schedule
    if schedule.restarts and schedule.restarts[-1] >= steps:
        raise UserError("schedule.restarts", f"the run has {steps} steps", value=list(schedule.restarts),
                        way_out=f"name steps before {steps}, or raise the length of the run")
    edges = [0, *schedule.restarts, steps]
    shortest = min(end - begin for begin, end in zip(edges, edges[1:], strict=False))
    if schedule.warmup >= max(1, shortest):
        between = " between two restarts" if schedule.restarts else ""
        raise UserError("schedule.warmup", f"the warm-up never ends in a run of {shortest} steps{between}",
                        value=schedule.warmup, way_out="use fewer steps, or a share such as 0.05")


def _activations(experiment: Experiment, config: PretrainedConfig, compute: torch.dtype) -> int | None:
    """Bytes that autograd saves for backward, counted on fake tensors, including saved fake-quantized weights.

    None where the model cannot run without data, as some mixtures of experts cannot: it can still be trained.
    """
    try:
        return saved_activation_bytes(
            lambda: empty_student(experiment.form, config),
            lambda: _example_inputs(experiment),
            None if compute is torch.float32 else compute)
    except (RuntimeError, NotImplementedError):
        return None


def _example_inputs(experiment: Experiment) -> dict[str, Any]:
    """Arguments of a forward; of language models with every token a document of its own, so that there is a mask."""
    batch = example_batch(experiment.data, experiment.training.micro_batch)
    return model_inputs(batch | ({"position_ids": batch["input_ids"]} if experiment.data.is_language else {}))


def _learning_rates(experiment: Experiment, steps: int | None, points: int = 41) -> list[tuple[int, float]]:
    steps = steps or NOMINAL_STEPS
    rate = experiment.schedule.build(experiment.optimizer.lr, steps)
    count = min(points, steps)
    chosen = sorted({round(index * (steps - 1) / max(1, count - 1)) for index in range(count)})
    return [(step, rate(step)) for step in chosen]

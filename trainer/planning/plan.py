"""The plan: every decision that follows from an experiment, as plain data, made from shapes alone, without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from strategies.rematerialization.recompute_plan import PROVEN
from trainer.distributed.rank_memory import check_blocks, is_sharded
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import resolved_table
from trainer.experiment.load import Source
from trainer.experiment.nodes import divisors
from trainer.experiment.precision import DTYPES as COMPUTE
from trainer.models.build import DTYPES, count_parameters, empty_student, export_skeleton
from trainer.models.full_precision import tell_share
from trainer.models.model_origin import skeleton
from trainer.models.router_balance import balancing_note
from trainer.planning.step_memory import MemoryPlan
from trainer.run.metrics import console, readable
from trainer.teacher.intermediate_losses import attach_projections
from trainer.teacher.target_cache import live, rank_residency, resident_teacher

BLOCKS = " ▁▂▃▄▅▆▇█"
NOMINAL_STEPS = 1000  # to draw a learning-rate curve before the length of the data is known


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
        processes: processes that train together.
        device: what they run on.
        batch_size: sequences per optimizer step over all processes.
        micro_batch: sequences per forward pass in one process.
        accumulation: forward passes per optimizer step in each process.
        tokens_per_step: positions per optimizer step, padding included.
        steps: optimizer steps; None while the data's length is not known.
        learning_rates: (step, learning rate) at evenly spaced steps; of `NOMINAL_STEPS` while `steps` is None.
        precision: number format of forward and backward.
        parameters: by model.
        student_bytes: bytes of the student's weight file: integers, scales, and what stays in full precision.
        teacher_bytes: bytes of the teacher's weight files, which a student's are compared with, here and in the report.
        ledger: bytes per process that training keeps, part by part.
        memory: bytes per process at the peak of a step; None where the architecture cannot run without data.
        sharding: how the student is shared out, in words.
        full_precision: what of a quantized student stays so, in words.
        balancing: whether the routers of a mixture of experts are balanced, in words.
    """

    processes: int
    device: str
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
    memory: MemoryPlan | None = None
    sharding: str = "none"
    full_precision: str | None = None
    balancing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for `plan.json`."""
        return {**asdict(self), "ledger": {**asdict(self.ledger), "total": self.ledger.total},
                "model_state": self.ledger.model_state}


def make_plan(experiment: Experiment, teacher: PretrainedConfig | None, student: PretrainedConfig, *,
              processes: int, device: str, rows: int | None,
              memory: MemoryPlan | None = None) -> Plan:
    """Plan a run from configurations; `rows` is the length of the data, where it is known, `memory` its own plan.

    Raises:
        UserError: the batch cannot be shared among the processes, or a layer cannot be quantized.
    """
    training, sequence = experiment.training, experiment.data.sequence_length
    check_batch(experiment, processes)
    steps = count_steps(experiment, rows)
    compute = COMPUTE[experiment.precision.dtype]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        small = empty_student(experiment, student)
        served, asked_bits = export_skeleton(experiment, student), experiment.student.quantization
        student_bytes = exported_bytes(served, DTYPES[experiment.export.dtype])
        whole = asked_bits and tell_share(served, asked_bits, DTYPES[experiment.export.dtype])
        parameters = count_parameters(small)
        attach_projections(experiment, small, teacher)
        large = asked = resident_teacher(experiment, teacher)
        if teacher is not None and live(asked) is None:
            large = skeleton(teacher, DTYPES[experiment.teacher.dtype], experiment.teacher.trust_remote_code, "teacher")
        if is_sharded(experiment, processes):
            check_blocks(experiment, student=small, teacher=live(asked))
        held = rank_residency(experiment, small, asked, processes, on_gpu=device != "cpu")
    positions = training.micro_batch * sequence
    vocabularies = student.vocab_size + (0 if asked is None else teacher.vocab_size)
    rows_at_once = tile_rows(positions, vocabularies, "cpu" if device == "cpu" else "cuda")
    ledger = Ledger.of(held, _activations(experiment, student, compute),
                       loss_bytes(positions, student.hidden_size, vocabularies, student.vocab_size, rows_at_once))
    return Plan(
        processes=processes, device=device, batch_size=training.batch_size, micro_batch=training.micro_batch,
        accumulation=training.batch_size // (training.micro_batch * processes),
        tokens_per_step=training.batch_size * sequence, steps=steps,
        learning_rates=_learning_rates(experiment, steps), precision=experiment.precision.dtype,
        parameters={"student": parameters} | ({"teacher": count_parameters(large)} if large else {}),
        student_bytes=student_bytes,
        teacher_bytes=_file_bytes(experiment, teacher, large) if large else 0, ledger=ledger, memory=memory,
        sharding=experiment.sharding.words(processes), full_precision=whole,
        balancing=balancing_note(experiment.objective, student))


def _file_bytes(experiment: Experiment, config: PretrainedConfig, model: nn.Module) -> int:
    """Bytes of a teacher's weight files; of one that is not here, of its tensors in the dtype that they are kept in."""
    assert experiment.teacher is not None
    path, dtype = experiment.teacher.path, getattr(config, "dtype", None) or torch.float32
    if path is not None and (files := weight_files(Path(path))):
        return sum(file.stat().st_size for file in files)
    if path is None:
        dtype = DTYPES[experiment.as_teacher("").export.dtype]
    return count_parameters(model) * (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)).itemsize


def check_batch(experiment: Experiment, processes: int) -> None:
    """Raise `UserError` if the batch cannot be shared evenly among the processes."""
    training = experiment.training
    if training.batch_size % (training.micro_batch * processes):
        share = training.batch_size // processes
        way_out = (f"micro_batch can be {divisors(share)}" if share * processes == training.batch_size
                   else f"make batch_size a multiple of {processes}")
        raise UserError("training.micro_batch", f"{processes} processes with this micro_batch cannot share a "
                        f"batch_size of {training.batch_size} evenly", value=training.micro_batch, way_out=way_out)
    if experiment.optimizer.in_backward and training.batch_size != training.micro_batch * processes:
        raise UserError("optimizer.in_backward", "weights that are updated in backward wait for no other micro-batch, "
                        f"and a batch_size of {training.batch_size} takes several", value=True,
                        way_out=f"set training.batch_size={training.micro_batch * processes}, or leave it out")


def count_steps(experiment: Experiment, rows: int | None) -> int | None:
    """Optimizer steps of a run; None while the number of rows is not known."""
    training = experiment.training
    if not training.steps and experiment.data.streaming:
        raise UserError("training.epochs", "a stream has no known length", value=training.epochs,
                        way_out="give `training.steps` instead")
    steps = training.steps
    if not steps and rows is not None:
        steps = -(-training.seen(rows) // training.batch_size)
    if steps and experiment.schedule.warmup >= max(1, steps):
        raise UserError("schedule.warmup", f"the warm-up never ends in a run of {steps} steps",
                        value=experiment.schedule.warmup, way_out="use fewer steps, or a share such as 0.05")
    return steps


def _activations(experiment: Experiment, config: PretrainedConfig, compute: torch.dtype) -> int | None:
    """Saved for backward, counted on fake tensors; the fake-quantized weights that products keep are in it.

    None where the model cannot run without data (some mixtures of experts): that is no reason not to train it.
    """
    try:
        return saved_activation_bytes(
            lambda: empty_student(experiment, config), experiment.training.micro_batch, experiment.data.sequence_length,
            None if compute is torch.float32 else compute)
    except (RuntimeError, NotImplementedError):
        return None


def _learning_rates(experiment: Experiment, steps: int | None, points: int = 41) -> list[tuple[int, float]]:
    steps = steps or NOMINAL_STEPS
    rate = experiment.schedule.build(experiment.optimizer.lr, steps)
    count = min(points, steps)
    chosen = sorted({round(index * (steps - 1) / max(1, count - 1)) for index in range(count)})
    return [(step, rate(step)) for step in chosen]


def show_plan(source: Source, plan: Plan) -> None:
    """Print the resolved experiment with the origin of each value, and the plan."""
    _print_columns(f"Experiment {source.experiment.name}: key, value, where it was written", resolved_table(source))
    _print_columns("Plan", _plan_rows(plan))
    _print_columns("Ledger: bytes per process, each part at its largest", [
        (name.replace("_", " "), f"{count:>15,}", readable(count)) for name, count in plan.ledger.rows()])
    if plan.memory is not None:
        _print_columns("Memory at the peak of a step: predicted bytes per process", _memory_rows(plan.memory))
    else:
        console.print("  activations and the peak are not in it: this architecture cannot be run without data")


def _print_columns(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned columns that a pipe does not cut off and `grep` finds whole."""
    console.print(f"\n{title}")
    widths = [min(44, max(len(row[column]) for row in rows)) for column in range(len(rows[0]) - 1)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        console.print("  " + "  ".join([*padded, row[-1]]))


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    steps = "known once the data is tokenized" if plan.steps is None else f"{plan.steps:,}"
    rows = [
        ("processes", f"{plan.processes} on {plan.device}"),
        ("effective batch", f"{plan.batch_size} sequences = {plan.micro_batch} per micro-batch x {plan.accumulation} "
                            f"accumulated x {plan.processes} processes; {plan.tokens_per_step:,} tokens"),
        ("sharding", plan.sharding), ("steps", steps),
        ("precision", f"{plan.precision} forward and backward, fp32 weights and updates"),
    ]
    rates = [rate for _, rate in plan.learning_rates]
    top = max(rates)
    curve = "".join(BLOCKS[max(1, round(rate / top * (len(BLOCKS) - 1)))] for rate in rates)
    nominal = "" if plan.steps else f", drawn over {NOMINAL_STEPS:,} steps"
    rows.append(("learning rate", f"{rates[0]:.2e} {curve} {rates[-1]:.2e} (peak {top:.2e}{nominal})"))
    rows += [(f"{name} parameters", f"{count:,}") for name, count in plan.parameters.items()]
    smaller = f", {plan.teacher_bytes / plan.student_bytes:.1f} times smaller than the teacher's " \
              f"{readable(plan.teacher_bytes)} of weight files" if plan.teacher_bytes else ""
    rows.append(("student file", f"{plan.student_bytes:,} bytes of tensors{smaller}"))
    if plan.full_precision is not None:
        rows.append(("not quantized", plan.full_precision))
    if plan.balancing is not None:
        rows.append(("routers", plan.balancing))
    return rows


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, ...]]:
    rows = [(name, f"{count:>15,}", readable(count))
            for name, count in sorted(memory.parts.items(), key=lambda part: -part[1]) if count]
    rows.append(("peak", f"{memory.peak:>15,}", f"{readable(memory.peak)}, at: {memory.moment}"))
    if memory.budget is None:
        return [*rows, ("budget", f"{'none':>15}", "nothing is recomputed; set memory.budget=... to fit fewer bytes")]
    rows.append(("budget", f"{memory.budget:>15,}", f"{readable(memory.budget)}; keeping all would need "
                                                    f"{readable(memory.keep_all)}"))
    if not memory.blocks and not memory.unplanned:
        return [*rows, ("recomputed", f"{'nothing':>15}", "the model fits as it is")]
    rows.append(("recomputed", f"{memory.recomputed:>15.1%}", "of the blocks' forward and backward time; a better "
                 f"schedule could save at most {memory.gap:.1%}"))
    if memory.solver == "exact":
        rows.append(("solver", f"{memory.solver:>15}", PROVEN))
    if memory.blocks:
        rows.append(("blocks", f"{'bytes kept':>15}", "by each between forward and backward, beside its input"))
    rows += [(" ".join(names), f"{kept:>15,}", what) for names, kept, what in _block_rows(memory)]
    return [*rows, *(("as it is", "", text) for text in memory.unplanned)]


def _block_rows(memory: MemoryPlan) -> list[tuple[list[str], int, str]]:
    """Blocks that run alike, together: names of the first and last, bytes each keeps, and how it runs."""
    rows: list[tuple[list[str], int, str]] = []
    for block in memory.blocks:
        what = "keeps all" if not block["seconds"] else f"recomputes {1000 * block['seconds']:.2f} ms"
        what += "" if block["segment"] is None else f", in the segment of blocks {block['segment'][0]} to " \
                                                    f"{block['segment'][1]}, of which one input is kept"
        if rows and rows[-1][1:] == (block["kept"], what):
            rows[-1][0][1:] = ["to", block["name"]]
        else:
            rows.append(([block["name"] or "model"], block["kept"], what))
    return rows


def plan_json(source: Source, plan: Plan) -> str:
    """The resolved experiment and the plan as JSON."""
    return json.dumps({"experiment": source.experiment.model_dump(mode="json"),
                       "origins": {key: origin for key, _, origin in resolved_table(source)},
                       "plan": plan.to_dict()}, indent=2)

"""The memory of the loop's step: planned before it runs, measured while it does, and told beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from strategies.memory.meter import Measured, measure
from strategies.memory.plot import curve, thinned
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.step_trace import CannotPlan
from strategies.rematerialization.rematerialize import study
from trainer.data.batches import Batch
from trainer.distributed.rank_memory import gradients_stay, in_backward, is_sharded
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.planning.step_memory import (
    POINTS,
    MemoryPlan,
    choose,
    describe,
    example_batch,
    plans_cache,
    reserved,
    study_experiment,
)
from trainer.run.folder import write_atomically
from trainer.run.metrics import Metrics, ProgressReporter, readable
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.target_cache import example_targets

if TYPE_CHECKING:  # pragma: no cover - the loop imports this module
    from trainer.training.loop import Trainer


def plan_step(trainer: Trainer) -> MemoryPlan | None:
    """Plan a step for the budget, with the models at hand, and make the student run by the plan.

    Where the student is shared out it is planned from its shapes: no process has it whole. None where the
    architecture cannot be planned, and no budget was asked for.

    Raises:
        UserError: a budget that cannot be promised or met.
    """
    experiment, training, data = trainer.experiment, trainer.experiment.training, trainer.experiment.data
    processes, student = trainer.accelerator.num_processes, trainer.unwrapped
    batch = example_batch(training.micro_batch, data.sequence_length, data.packing, trainer.accelerator.device)
    shapes = trainer.teacher_config, student.config

    def again(changed: Experiment, regions: bool, tile: int | None) -> Planner:
        return study_experiment(changed, *shapes, processes, regions, tile)

    try:
        planner, chosen, tile, keep_all = choose(
            experiment, again, None if is_sharded(experiment, processes) else
            lambda regions, tile: _study(trainer, batch, regions, tile), processes)
    except CannotPlan as error:
        if experiment.memory.bytes is None:
            return None
        raise UserError("memory.budget", f"cannot be promised for this architecture: {error}",
                        value=experiment.memory.budget, way_out="leave memory.budget out") from error
    planner.install(chosen, inductor=experiment.memory.compile, model=student)
    trainer.distillation.tile = tile
    memory = describe(planner, chosen, tile, keep_all)
    if trainer.accelerator.is_main_process and trainer.folder.plan.exists():
        plan = json.loads(trainer.folder.plan.read_text())
        write_atomically(trainer.folder.plan, json.dumps({**plan, "memory": asdict(memory)}, indent=2))
    return memory


def _study(trainer: Trainer, batch: Batch, regions: bool, tile: int | None) -> Planner:
    experiment, processes = trainer.experiment, trainer.accelerator.num_processes
    trainer.distillation.tile = tile
    planned = trainer.distillation.planned()
    return study(
        trainer.unwrapped, batch, optimizer=trainer.optimizer, in_backward=in_backward(experiment),
        accumulate=gradients_stay(experiment, processes),
        loss=lambda model, batch: loss_of_batch(
            planned, trainer.precision, model, batch,
            teacher_targets=example_targets(experiment, trainer.teacher_config, batch, trainer.asked))[0],
        others=[] if trainer.asked is None else [trainer.asked],
        reserved=reserved(experiment, processes, trainer.accelerator.device.type), regions=regions,
        solver=experiment.memory.solver, cache=plans_cache(experiment))


def measured_step(trainer: Trainer, batches: Iterator[Batch]) -> tuple[dict[str, Any], Measured]:
    """A training step whose memory is measured."""
    records: list[dict[str, Any]] = []
    resident = [*trainer.engine.resident(), *([] if trainer.asked is None else [trainer.asked])]
    found = measure(lambda: records.append(trainer.train_step(batches)), trainer.accelerator.device, resident)
    return records[0], found


def report_memory(trainer: Trainer, found: Measured, metrics: Metrics, progress: ProgressReporter) -> int:
    """Write what was measured, of the process with the highest peak, and say it beside what was planned.

    Returns:
        Bytes at that peak.
    """
    own = torch.tensor([found.peak, found.base], device=trainer.accelerator.device)
    every = trainer.accelerator.gather(own).view(-1, 2).tolist()
    found = replace(found, peak=max(peak for peak, _ in every), base=max(base for _, base in every))
    drawn = curve(found)
    metrics.write({"step": trainer.step, "memory": {
        "peak": found.peak, "base": found.base, "peaks": [peak for peak, _ in every], "reserved": found.reserved,
        "marks": drawn.marks,
        "curve": [[float(at), int(count)] for at, count in thinned(drawn, POINTS)]}})
    reserved_ = "" if found.reserved is None else f", {readable(found.reserved)} reserved"
    planned = "" if trainer.memory is None else f", {readable(trainer.memory.peak)} planned"
    budget = trainer.experiment.memory.bytes
    progress.say(f"step {trainer.step}: memory peak {readable(found.peak)} measured{reserved_}{planned}"
               + ("" if budget is None else f", budget {readable(budget)}"))
    return found.peak

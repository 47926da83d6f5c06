"""The training loop: runs optimizer steps through Accelerate, with evaluation, checkpoints and logging in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from strategies.common.frozen_base import base_digest, base_digests
from strategies.common.generation_settings import copy_generation_settings
from strategies.common.running_statistics import RunningStatistics
from strategies.distillation.live_teacher import always
from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.step import Distillation
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter
from strategies.memory.meter import mark
from strategies.quantization.qat import set_bits
from trainer import checkpoints
from trainer.checkpoints.random_state import seed_everything
from trainer.data.batches import Batch, with_learned
from trainer.data.dataset import PreparedData
from trainer.data.first_rows import first_rows
from trainer.distributed import signals
from trainer.distributed.launch import engine_for, place_teacher
from trainer.distributed.rank_group import RankGroup
from trainer.distributed.rank_memory import RankSetup
from trainer.errors import RunFailed
from trainer.experiment.experiment import Experiment
from trainer.models.build import build_student, empty_student, layers_above, shape_of
from trainer.models.router_balance import balancing_weight
from trainer.planning.exceeded import ways_out
from trainer.planning.plan import Plan
from trainer.planning.step_memory import without_gradient
from trainer.planning.step_plan import as_in_training
from trainer.run.folder import RunFolder
from trainer.run.metrics import Metrics, ProgressReporter, console, memory_peak
from trainer.run.pace import Pace
from trainer.run.trackers import Trackers
from trainer.run.working import noted, working
from trainer.teacher.exit_losses import attach_parts, build_exits
from trainer.teacher.intermediate_losses import build_intermediate, reweigh, without_projections
from trainer.teacher.logit_cache import CachedLogits
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.other_teachers import Beside, placed, present_on_demand
from trainer.teacher.start_features import start_features
from trainer.teacher.target_cache import CachedTargets
from trainer.training.best_evaluation import BestEvaluation
from trainer.training.cadence import Cadence
from trainer.training.compile_choice import install_schedule
from trainer.training.evaluation import held_out_evaluator
from trainer.training.evaluations import Evaluations
from trainer.training.memory_check import MemoryCheck
from trainer.training.nonfinite import Backward, diagnosis, locate_nonfinite
from trainer.training.saving import Saver
from trainer.training.sparse_training import SparseTraining
from trainer.training.step_input import StepInput, StepInputs, Writer, batches_of, rows_in_all
from trainer.training.task_evaluation import TaskEvaluator
from trainer.training.train_state import TrainState

LEAVING = 10.0  # seconds that a run which ends early waits for a checkpoint that is still being committed
MEASURED = 3  # which step of this process is measured, counted from 1: optimizer state and DDP's buckets exist by then


class TrainLoop:
    """Trains a student according to a plan, with or without a teacher, and resumes after interruptions.

    Attributes:
        plan: the plan being carried out.
        state: steps done, counters, loss scale.
        exported: the step whose weights the student has after training; None until then.
        frozen_digests: of the base beneath adapters, where the engine holds it in other numbers or in parts.
        engine: holds the student and its optimizer, sharded or replicated; `student` is the module to call.
        ranks: the processes of the run.
        evaluations: evaluates the student on the held-out rows, and on tasks.
        saver: writes and finds checkpoints.
    """

    def __init__(self, experiment: Experiment, plan: Plan, folder: RunFolder, accelerator: Accelerator,
                 text: PreparedData, student: nn.Module, teacher: nn.Module | None = None,
                 teacher_config: PretrainedConfig | None = None,
                 related: tuple[SharedVocabulary | None, TeacherInputAdapter] = (None, identity_adapter),
                 cached: CachedTargets | CachedLogits | None = None, others: Sequence[Beside] = ()) -> None:
        """Set up models and optimizer on their devices, and resume from the newest checkpoint if there is one.

        Args:
            student: the unsharded student, with weights.
            teacher: a live teacher; None if it is never asked in training.
            teacher_config: the teacher's configuration, whether it is live or cached.
            related: the shared tokens where the vocabularies differ (else None), and the adapter that turns the
                student's input into the teacher's.
            cached: reads the teacher's cached targets; with a live teacher, only those of the first steps.
            others: further teachers.

        Raises:
            UserError: no held-out row has a target token.
            RunFailed: the checkpoint to resume from was written by another model or version.
        """
        self.experiment, self.plan, self.folder, self.text = experiment, plan, folder, text
        self.accelerator, self.ranks = accelerator, RankGroup(accelerator, plan.topology, experiment.run.timeout)
        self.teacher_config = teacher_config
        setup = RankSetup.of(experiment, plan.topology)
        self.cached, live = cached, teacher if experiment.uses_teacher else None
        shapes = shape_of(student), None if live is None else shape_of(live)  # before they are wrapped or sharded
        self.precision = experiment.precision.build(accelerator.device.type)
        self.steps = plan.steps
        self.state = TrainState(self.precision, BestEvaluation.of(experiment.training, self.steps))
        self.learning_rate = experiment.schedule.build(experiment.optimizer.lr, self.steps)
        base = base_digest(student) if self.ranks.main else None
        self.frozen_digests = base_digests(student, self.ranks.main) if setup.changes_frozen else {}
        turns = experiment.teacher is not None and experiment.teacher.take_turns
        self.others = placed(others, accelerator.device, turns)
        present = present_on_demand(live, accelerator.device, True) if turns and live is not None else always
        self.teacher = live if live is None or turns else place_teacher(setup, accelerator, live)
        variances = start_features(
            experiment.objective, lambda count: first_rows(text, count, experiment.seed), plan.micro_batch, student,
            self.teacher)
        self.engine = engine_for(setup, experiment.precision.loss_scale, accelerator, student, plan.bucket,
                                 lambda: without_gradient(experiment, teacher_config, student.config))
        self.evaluations = Evaluations(
            experiment.name, self.steps, experiment.student,
            held_out_evaluator(experiment.data, text, self.unwrapped, shapes[0], plan.micro_batch, self.ranks,
                               self._autocast),
            TaskEvaluator(experiment.evaluate, self.unwrapped, text.tokenizer,
                          plan.micro_batch * experiment.data.sequence_length, self.ranks, self._autocast), self.ranks)
        self.distillation = Distillation(
            experiment.objective.build(teacher is not None or cached is not None), self.unwrapped, self.teacher,
            shapes=shapes, common=related[0], reader=related[1], tile=plan.step and plan.step.tile,
            intermediate=build_intermediate(experiment.objective, self.unwrapped, self.teacher, variances),
            balancing=balancing_weight(experiment.objective, self.unwrapped.config),
            others=[one.judge for one in self.others], present=present,
            exits=build_exits(experiment.objective, self.unwrapped))
        self.memory = MemoryCheck(experiment.memory, plan.memory, self.ranks, self._resident, lambda excess: ways_out(
            experiment, teacher_config, self.unwrapped.config, plan.topology, excess))
        self.backward = Backward(self.unwrapped)
        self.statistics = RunningStatistics(self.unwrapped)
        seed_everything(experiment.seed * 1_000_003 + self.ranks.index + 1)  # each process draws its own dropout masks
        self.saver = Saver(folder, experiment.training, self.engine, self.ranks, self._say, base)
        self.sparse = SparseTraining(experiment.student.sparsity, self.unwrapped, self.steps)
        self.engine.sparse = self.sparse.weights
        self.saver.resume(self.state)
        install_schedule(plan.step, experiment.memory.compile, self.state, self.unwrapped, self.ranks,
                         plan.accumulation, self._autocast, setup.is_sharded, self._say)
        self.sparse.resumed(self.state.step)
        self.exported: int | None = None
        self._scheduled: dict[str, Any] = {}  # what of the objective moves, and its values in the present step
        self._measured_at = min(self.state.step + MEASURED, self.steps) - 1
        self._begun = False
        self.trackers = Trackers(accelerator, experiment.name, bool(experiment.run.trackers))

    @property
    def student(self) -> nn.Module:
        """The student as training calls it, with any wrappers."""
        return self.engine.model

    @property
    def unwrapped(self) -> nn.Module:
        """The student without wrappers: for saving and later evaluation, never for a training step."""
        return self.engine.student

    @property
    def cadence(self) -> Cadence:
        """When the run evaluates, saves and ends."""
        return Cadence(self.experiment.training, self.steps, self.experiment.evaluate.every)

    def inputs(self) -> StepInputs:
        """The inputs of the remaining steps, starting at the state's step."""
        writer = Writer(self.experiment.objective.on_policy, self.experiment.seed, self.plan, self.ranks, self.text,
                        self.unwrapped, self._autocast, self._warm_steps)
        return StepInputs(self._batches(), self.plan, self.ranks, writer, writer.writes)

    def _batches(self) -> Iterator[Batch]:
        return batches_of(self.experiment, self.plan, self.ranks, self.text, self.state.rows)

    def train(self) -> None:
        """Train from the state's step to the last one, with evaluations and checkpoints in between.

        With `training.keep_best` the student then has the weights of the best evaluation, which may also have ended the
        training early.

        Raises:
            Stopped: a process received a stop signal.
            BudgetUnmet: the measured step exceeded the budget, with `memory.exceeded: stop`.
            RunFailed: too many steps in a row were not finite, the weights are not finite, or another process is gone.
        """
        settings, state = self.experiment.training, self.state
        metrics = Metrics(self.folder.metrics, self.ranks.main, state.step,
                          Pace(self.steps, settings.evaluate_every, settings.checkpoint_every,
                               self.experiment.evaluate.every))
        progress = ProgressReporter(self.experiment.name, self.steps, state.step, self.experiment.run.log_every,
                                    self.ranks.main, metrics.pace)
        if state.step:
            progress.say(f"resumed at step {state.step}")
        inputs, end = self.inputs(), rows_in_all(self.experiment.training, self.text)
        try:
            with signals.defer_signals(), self.ranks.watch.on(), as_in_training(self.plan.topology):
                cut_off = self.evaluations.interrupted(state, self.cadence, self.folder.metrics)
                self._evaluate(cut_off, metrics, progress)
                while not self.cadence.ends(state):
                    measured = None
                    if state.step == self._measured_at:
                        record, measured = self.memory.measured(lambda: self._step(inputs))
                    else:
                        record = self._step(inputs)
                    if record is None:
                        self.saver.stop(state, self.experiment.name)
                    state.advance(self.plan.batch_size, end)
                    self._log(record, metrics, progress)
                    if measured is not None and "empty" not in record:
                        peak = self.memory.report(state.step, measured, metrics, progress)
                        self.memory.keep_budget(state.step, peak, metrics, progress, self._saved_now)
                    self._evaluate(self.evaluations.due(state, self.cadence), metrics, progress)
                    if self.cadence.saves(state):
                        self._save(metrics)
                    if state.nonfinite >= settings.nonfinite_limit:
                        self._saved_now()
                        raise RunFailed(diagnosis(record, state.nonfinite, self.folder.checkpoints))
                if not self.steps:
                    self.saver.save(state)
                self.saver.finish()
                if state.empty_steps:
                    progress.say(f"{state.empty_steps} of {self.steps} steps had no target token and taught nothing")
        finally:
            self.saver.finish(LEAVING)
            progress.close()
            metrics.close()
        self.exported = self.saver.take_best(state)

    def train_step(self, inputs: StepInputs) -> dict[str, Any] | None:
        """Run one optimizer step over the plan's micro-batches on every process, and return the record to log.

        The loss is the objective summed over all target tokens of the step, across micro-batches and processes, and
        divided by their number, so it does not depend on how the batch is split. Returns None if a process received a
        stop signal; all processes agree on that before anything has changed.

        The step synchronizes with the device twice: for its losses, which share one reduction with the next step's
        token count, and for the gradient norm, before the weights change.
        """
        started = time.perf_counter()
        number, rate = self.state.step + 1, self.learning_rate(self.state.step)
        self._set_bits(self.state.step)
        self._set_weights(self.state.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        given = inputs.take(self.state.step)
        if given.stops:
            return None
        self.sparse.prune(self.state.step)
        if not given.tokens:
            return self._empty(rate, given.seen, started)
        rows = [batch["row"] for batch in given.micro_batches]
        self.statistics.keep()
        sums, finite = self._gradients(given)
        ahead = inputs.look_ahead(self.state.step)
        self.ranks.at(f"the sum of losses of step {number}")
        totals = self.ranks.read_totals(*sums.values(), *ahead)
        inputs.agree(*totals[len(sums):])
        means = {name: _mean(total, given.tokens) for name, total in zip(sums, totals, strict=False)}
        self.ranks.at(f"the update of step {number}")
        mark("update")
        norm = self._update(math.isfinite(means["loss"]))
        record = self._record(means, norm, rate, given.tokens, given.seen) | self._scheduled | (
            self.sparse.shown(self.state.step))
        if self.state.nonfinite:
            record["nonfinite"] = locate_nonfinite(self.accelerator, rows, finite)
        record["seconds"] = time.perf_counter() - started
        return record

    def _gradients(self, given: StepInput) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Run forward and backward on all micro-batches.

        Returns the sums of the loss and its terms, and for each micro-batch whether its loss and gradient were finite.
        Each micro-batch is removed from `given`, so that its memory is freed after use.
        """
        sums: dict[str, torch.Tensor] = {}
        finite: list[torch.Tensor] = []
        for index in range(1, self.plan.accumulation + 1):
            self.ranks.at(f"the gradients of step {self.state.step + 1}, micro-batch {index}")
            batch, last = given.micro_batches.pop(0), index == self.plan.accumulation
            with self.engine.accumulating(last):
                if last:
                    mark("forward")
                loss, terms = self._loss(batch)
                # Engines average gradients over the data-parallel ranks, but the loss is a mean over all tokens of the
                # step: multiply by the number of ranks to undo the average.
                share = loss * (self.plan.topology.data_parallel / given.tokens)
                if last:
                    mark("backward")
                self.engine.backward(share if self.engine.scales else self.precision.scale(share))
            finite.append(self.backward.finite(loss))
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value
        return sums, finite

    # ---- parts of a step

    def _record(self, means: dict[str, float | None], norm: float | None, learning_rate: float, tokens: int, seen: int
                ) -> dict[str, Any]:
        """The log record of a step."""
        rows = {} if self.experiment.data.is_language else {"rows": self.plan.batch_size}
        return {"step": self.state.step + 1, **means, "gradient_norm": norm, "learning_rate": learning_rate,
                "tokens": tokens, "tokens_seen": seen, **rows, "loss_scale": self.precision.loss_scale,
                "skipped": self.precision.skipped, "growths": self.precision.growths}

    def _empty(self, learning_rate: float, seen: int, started: float) -> dict[str, Any]:
        """The record of a step in which no process has a target token: no loss, no update; the schedule moves on."""
        self.state.empty_steps += 1
        return {**self._record({"loss": None}, None, learning_rate, 0, seen), "empty": True,
                "empty_steps": self.state.empty_steps, "seconds": time.perf_counter() - started}

    def _set_bits(self, step: int) -> None:
        """Set the bit width of the quantized layers for a step, if bits follow a schedule."""
        asked = self.experiment.student.quantization
        bits = asked and asked.bits_at(step, self.steps)
        if bits:
            set_bits(self.unwrapped, bits)

    def _set_weights(self, step: int) -> None:
        """Set weights, temperature and share of the loss for a step, where they follow a schedule."""
        objective = self.experiment.objective
        if not objective.scheduled:
            return
        now = objective.at(step / self.steps)
        self._scheduled = {"scheduled": {f"objective.{key}": now.value(key) for key in objective.scheduled}}
        self.distillation.objective = now.build(self.teacher is not None or self.cached is not None)
        reweigh(self.distillation.intermediate, now)

    @property
    def _warm_steps(self) -> int:
        """How many of the run's steps, the first ones, use cached targets."""
        return 0 if self.experiment.teacher is None else self.experiment.teacher.targets.warm_steps(self.steps)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        taught = apart = None
        if self.state.step < self._warm_steps:
            taught = None if self.cached is None else self.cached(batch)
            apart = [one.cached(batch) for one in self.others if one.cached is not None]
        distillation = self.distillation.without_text() if "written" in batch else self.distillation
        return loss_of_batch(distillation, self.precision, self.student, self.ranks.place(with_learned(batch)),
                             self.engine.casts, taught, apart)

    def _update(self, loss_finite: bool) -> float:
        """Clip the gradient, update the weights if everything is finite, and return the norm before clipping."""
        scale = 1.0 if self.engine.scales else self.precision.loss_scale
        done = self.engine.update(self.experiment.training.clip, loss_finite, scale)
        if not done.taken:
            self.statistics.restore()
        overflow = self.precision.overflowed(loss_finite, done.finite)
        self.state.nonfinite = 0 if done.taken or overflow else self.state.nonfinite + 1
        if self.engine.scales:
            self.precision.follow(self.engine.loss_scale, overflow)
        else:
            self.precision.settle(overflow, done.finite)
        return done.norm

    # ---- after training

    def whole(self) -> nn.Module:
        """The unsharded student, for the main process.

        A sharded student is rebuilt and loaded from the last checkpoint, or the best one. This is not a collective:
        nothing is gathered, and no other process takes part.

        Raises:
            RunFailed: the student is sharded and its last checkpoint could not be written.
        """
        if not self.engine.sharded:
            return without_projections(self.unwrapped)
        self.saver.finish()
        own, newest = self.folder.checkpoints / checkpoints.NAME.format(
            self.state.step if self.exported is None else self.exported), self.saver.last
        if not own.is_dir():
            raise RunFailed("the student is shared out over processes, and is put together from its last checkpoint, "
                            f"which could not be written to {self.folder.checkpoints}.\n  -> make room there and start "
                            "the same command again: the run goes on from "
                            + ("its beginning" if newest is None else newest.name))
        experiment, config = self.experiment, self.unwrapped.config
        model = empty_student(experiment.form, config) if experiment.student.adapter is None else build_student(
            experiment, config, layers_above(experiment.student, experiment.teacher, self.teacher_config),
            self.text.tokenizer)  # with the base of its adapters, which no checkpoint holds
        copy_generation_settings(self.unwrapped, model)
        attach_parts(self.experiment.objective, self.experiment.seed, model, self.teacher_config)
        checkpoints.load_whole(own, model.train())
        return without_projections(model)

    def release(self) -> None:
        """Release models and optimizer, so that the next training in this process finds the memory free."""
        self.engine.release()
        self.engine = self.teacher = self.cached = self.others = self.distillation = None
        self.evaluations = self.saver = self.memory = self.plan = self.sparse = None
        self.accelerator.free_memory()

    # ---- helpers

    def _evaluate(self, kinds: list[str], metrics: Metrics, progress: ProgressReporter) -> None:
        """Carry out evaluations; stop if a process received a stop signal."""
        for kind in kinds:
            if not self.evaluations.carry_out(kind, self.student, self.state, metrics, progress, self.trackers):
                self.saver.stop(self.state, self.experiment.name)

    def _autocast(self) -> AbstractContextManager:
        return self.precision.autocast(self.engine.casts)

    def _resident(self) -> list[object]:
        """The objects whose memory is resident between steps."""
        held = self.teacher, None if self.cached is None else self.cached.head
        return [*self.engine.resident(), *(one for one in held if one is not None),
                *(held for one in self.others for held in one.resident)]

    def _step(self, inputs: StepInputs) -> dict[str, Any] | None:
        """`train_step`, and a word before the first one of this process if that takes long: it may compile."""
        if self._begun:
            return self.train_step(inputs)
        self._begun = True
        with working(self.experiment.name, f"step {self.state.step + 1}, the first one here"):
            return self.train_step(inputs)

    def _save(self, metrics: Metrics) -> None:
        begun = time.perf_counter()
        with working(self.experiment.name, "saving"):
            self.saver.save(self.state)
        metrics.write({"step": self.state.step, "checkpoint": checkpoints.NAME.format(self.state.step),
                       "seconds": time.perf_counter() - begun})

    def _saved_now(self) -> str:
        """Write a checkpoint now and wait until it is committed; returns a message naming the newest checkpoint."""
        self.saver.save(self.state)
        self.saver.finish()
        newest = self.saver.last
        return "no checkpoint could be written" if newest is None else f"{newest.name} is saved"

    def _say(self, text: str) -> None:
        if self.ranks.main:
            console.print(f"{self.experiment.name}  {noted(text)}")

    def _log(self, record: dict[str, Any], metrics: Metrics, progress: ProgressReporter) -> None:
        unit = "rows" if "rows" in record else "tokens"
        record[f"{unit}_per_second"] = record[unit] / record["seconds"]
        record["memory_peak"], record["memory_kind"] = memory_peak(self.accelerator.device)
        if "nonfinite" in record:
            progress.say(f"step {self.state.step}: non-finite loss or gradient, step skipped "
                         f"{record['nonfinite'] or ''}")
        if record.get("empty_steps") == 1:
            progress.say(f"step {self.state.step}: no target token in the whole batch, so that there is no loss and "
                         "nothing is learned; more such steps are counted in metrics.jsonl as empty_steps, and not "
                         "told")
        metrics.write(record)
        self.trackers.log({name: value for name, value in record.items() if isinstance(value, (int, float))},
                          self.state.step)
        progress.step(self.state.step, record)


def _mean(total: float, tokens: int) -> float:
    """A mean computed in fp32, like the loss terms themselves."""
    return float(np.float32(total) / np.float32(tokens))

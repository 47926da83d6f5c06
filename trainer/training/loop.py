"""The loop: batches in, one optimizer step after another, through Accelerate. Reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.step import Distillation
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter
from strategies.memory.meter import mark
from strategies.quantization.qat import set_bits
from trainer import checkpoints
from trainer.checkpoints.random_state import seed_everything
from trainer.data.batches import Batch, with_learned
from trainer.data.dataset import PreparedData
from trainer.distributed import signals
from trainer.distributed.launch import engine_for, place_teacher
from trainer.distributed.rank_group import RankGroup
from trainer.distributed.rank_memory import RankSetup
from trainer.errors import RunFailed
from trainer.experiment.experiment import Experiment
from trainer.models.build import shape_of, whole_student
from trainer.models.router_balance import balancing_weight
from trainer.planning.exceeded import ways_out
from trainer.planning.plan import Plan
from trainer.planning.step_memory import without_gradient
from trainer.run.folder import RunFolder
from trainer.run.metrics import Metrics, ProgressReporter, console, memory_peak, read_lines
from trainer.teacher.intermediate_losses import attach_projections, build_intermediate, without_projections
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.target_cache import CachedTargets
from trainer.training.evaluation import Evaluator
from trainer.training.memory_check import MemoryCheck
from trainer.training.nonfinite import Backward, diagnosis, locate_nonfinite
from trainer.training.saving import Saver
from trainer.training.step_input import StepInput, StepInputs, Writer, batches_of
from trainer.training.train_state import TrainState

LEAVING = 10.0  # seconds that a run which ends early waits for the checkpoint it was committing
MEASURED = 3  # the step of a process, counted from 1, whose memory is measured: state exists, DDP has its buckets


class TrainLoop:
    """Trains a student, with or without a teacher, as a plan says, and goes on after any interruption.

    Attributes:
        plan: what is carried out.
        state: steps done, counters, loss scale.
        engine: holds the student and its optimizer on their ranks; `student` is what is called.
        ranks: the processes of the run.
        evaluate: the student on held-out rows.
        saver: writes and finds checkpoints.
    """

    def __init__(self, experiment: Experiment, plan: Plan, folder: RunFolder, accelerator: Accelerator,
                 text: PreparedData, student: nn.Module, teacher: nn.Module | CachedTargets | None = None,
                 teacher_config: PretrainedConfig | None = None,
                 related: tuple[SharedVocabulary | None, TeacherInputAdapter] = (None, identity_adapter)) -> None:
        """Put the models in their places, and the state where the last checkpoint left it.

        Args:
            student: with weights, whole.
            teacher: alive, or what was kept of it; None for training on the text alone.
            teacher_config: of a teacher, alive or not.
            related: the tokens that both have, where the vocabularies differ, and how the teacher reads the text.

        Raises:
            UserError: no held-out row has a target.
            RunFailed: the checkpoint to go on from is of another model or version.
        """
        self.experiment, self.plan, self.folder, self.text = experiment, plan, folder, text
        self.accelerator, self.ranks = accelerator, RankGroup(accelerator, plan.topology, experiment.run.timeout)
        self.teacher_config = teacher_config
        setup = RankSetup.of(experiment, plan.topology)
        self.cached = teacher if isinstance(teacher, CachedTargets) else None
        live = teacher if self.cached is None and experiment.uses_teacher else None
        shapes = shape_of(student), None if live is None else shape_of(live)  # while they are whole
        self.precision = experiment.precision.build(accelerator.device.type)
        self.state, self.steps = TrainState(self.precision), plan.steps
        self.learning_rate = experiment.schedule.build(experiment.optimizer.lr, self.steps)
        self.teacher = None if live is None else place_teacher(setup, accelerator, live)
        self.engine = engine_for(setup, experiment.precision.loss_scale, accelerator, student, plan.bucket,
                                 lambda: without_gradient(experiment, teacher_config, student.config))
        self.evaluate = Evaluator(self.unwrapped, shapes[0], text.held_out, plan.micro_batch, self.ranks,
                                  self._autocast)
        self.distillation = Distillation(
            experiment.objective.build(teacher is not None), self.unwrapped, self.teacher, shapes=shapes,
            common=related[0], reader=related[1], tile=plan.step and plan.step.tile,
            intermediate=build_intermediate(experiment.objective, self.unwrapped, self.teacher),
            balancing=balancing_weight(experiment.objective, self.unwrapped.config))
        if plan.step is not None:
            plan.step.install(self.unwrapped, inductor=experiment.memory.compile)
        self.memory = MemoryCheck(experiment.memory, plan.memory, self.ranks, self._resident, lambda excess: ways_out(
            experiment, teacher_config, self.unwrapped.config, plan.topology, excess))
        self.backward = Backward(self.unwrapped)
        seed_everything(experiment.seed * 1_000_003 + self.ranks.index + 1)  # dropout, apart on each process
        self.saver = Saver(folder, experiment.training, self.engine, self.ranks, self._say)
        self.saver.resume(self.state)
        self._measured_at = min(self.state.step + MEASURED, self.steps) - 1
        self._tracks = bool(experiment.run.trackers)  # teacher and control, trained by the way, have none

    @property
    def student(self) -> nn.Module:
        """The student as it is called in training, whatever wraps it."""
        return self.engine.model

    @property
    def unwrapped(self) -> nn.Module:
        """The student itself, without wrappers: for saving and evaluation afterwards, never for training."""
        return self.engine.student

    def inputs(self) -> StepInputs:
        """What the steps from the state's on begin with."""
        writer = Writer(self.experiment.objective.on_policy, self.experiment.seed, self.plan, self.ranks, self.text,
                        self.unwrapped, self._autocast)
        return StepInputs(self._batches(), self.plan, self.ranks, writer, writer.writes)

    def _batches(self) -> Iterator[Batch]:
        return batches_of(self.experiment, self.plan, self.ranks, self.text, self.state.step)

    def train(self) -> None:
        """Train from the state's step to the last one, evaluating and saving on the way.

        Raises:
            Stopped: a signal asked for it.
            BudgetUnmet: a measured step took more than the budget, and is to stop the run.
            RunFailed: too many steps were not finite, weights are not, or another process is missing.
        """
        settings, state = self.experiment.training, self.state
        metrics = Metrics(self.folder.metrics, self.ranks.main, state.step)
        progress = ProgressReporter(self.experiment.name, self.steps, state.step, self.experiment.run.log_every,
                                    self.ranks.main)
        if state.step:
            progress.say(f"resumed at step {state.step}")
        inputs = self.inputs()
        try:
            with signals.defer_signals(), self.ranks.watch.on():
                if self._lacks_evaluation():
                    self._evaluate(metrics, progress)
                while state.step < self.steps:
                    measured = None
                    if state.step == self._measured_at:
                        record, measured = self.memory.measured(lambda: self.train_step(inputs))
                    else:
                        record = self.train_step(inputs)
                    if record is None:
                        self.saver.stop(state, self.experiment.name)
                    state.step += 1
                    self._log(record, metrics, progress)
                    if measured is not None and "empty" not in record:
                        peak = self.memory.report(state.step, measured, metrics, progress)
                        self.memory.keep_budget(state.step, peak, metrics, progress, self._saved_now)
                    if self._evaluates():
                        self._evaluate(metrics, progress)
                    if state.step % settings.checkpoint_every == 0 or state.step == self.steps:
                        self.saver.save(state)
                    if state.nonfinite >= settings.nonfinite_limit:
                        self._saved_now()
                        raise RunFailed(diagnosis(record, state.nonfinite, self.folder.checkpoints))
                self.saver.finish()
                if state.empty_steps:
                    progress.say(f"{state.empty_steps} of {self.steps} steps had no target token and taught nothing")
        finally:
            self.saver.finish(LEAVING)
            progress.close()
            metrics.close()

    def train_step(self, inputs: StepInputs) -> dict[str, Any] | None:
        """One optimizer step over the plan's micro-batches on every process; returns what to log.

        The loss is the objective's sum over all target tokens of the step divided by their number, over micro-batches
        and processes, so it does not depend on how the batch is split. None where a process was asked to stop, on which
        all agree before anything has changed.

        The device is waited for twice: for the losses of the step, which one reduction brings together with the next
        step's tokens, and for the gradient's norm, before the weights move.
        """
        started = time.perf_counter()
        number, rate = self.state.step + 1, self.learning_rate(self.state.step)
        self._set_bits(self.state.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        given = inputs.take(self.state.step)
        if given.stops:
            return None
        if not given.tokens:
            return self._empty(rate, started)
        rows = [batch["row"] for batch in given.micro_batches]
        sums, finite = self._gradients(given)
        ahead = inputs.look_ahead(self.state.step)
        self.ranks.at(f"the sum of losses of step {number}")
        *totals, tokens, stops = self.ranks.read_totals(*sums.values(), *ahead)
        inputs.agree(tokens, stops)
        means = {name: _mean(total, given.tokens) for name, total in zip(sums, totals, strict=True)}
        self.ranks.at(f"the update of step {number}")
        mark("update")
        norm = self._update(math.isfinite(means["loss"]))
        record = self._record(means, norm, rate, given.tokens)
        if self.state.nonfinite:
            record["nonfinite"] = locate_nonfinite(self.accelerator, rows, finite)
        record["seconds"] = time.perf_counter() - started
        return record

    def _gradients(self, given: StepInput) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Forward and backward of all micro-batches: sums of the loss and its terms; whether each was finite.

        Micro-batches are taken out of what is given, so that each is let go when it has been used.
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
                # Engines average gradients over data-parallel ranks; the sum over their tokens is wanted.
                share = loss * (self.plan.topology.data_parallel / given.tokens)
                if last:
                    mark("backward")
                self.engine.backward(share if self.engine.scales else self.precision.scale(share))
            finite.append(self.backward.finite(loss))
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value
        return sums, finite

    # ---- parts of a step

    def _record(self, means: dict[str, float | None], norm: float | None, learning_rate: float, tokens: int
                ) -> dict[str, Any]:
        """What a step is remembered by."""
        return {"step": self.state.step + 1, **means, "gradient_norm": norm, "learning_rate": learning_rate,
                "tokens": tokens, "loss_scale": self.precision.loss_scale, "skipped": self.precision.skipped,
                "growths": self.precision.growths}

    def _empty(self, learning_rate: float, started: float) -> dict[str, Any]:
        """A step in which no process has a target token: there is no loss, and nothing moves but the schedule."""
        self.state.empty_steps += 1
        return {**self._record({"loss": None}, None, learning_rate, 0), "empty": True,
                "empty_steps": self.state.empty_steps, "seconds": time.perf_counter() - started}

    def _set_bits(self, step: int) -> None:
        """Give quantized layers the bits of a step, where they have a schedule."""
        asked = self.experiment.student.quantization
        bits = asked and asked.bits_at(step, self.steps)
        if bits:
            set_bits(self.unwrapped, bits)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        taught = None if self.cached is None else self.cached(batch)
        distillation = self.distillation.without_text() if "written" in batch else self.distillation
        return loss_of_batch(distillation, self.precision, self.student, self.ranks.place(with_learned(batch)),
                             self.engine.casts, taught)

    def _update(self, loss_finite: bool) -> float:
        """Clip, step the weights if everything is finite, and return the gradient's norm before clipping."""
        scale = 1.0 if self.engine.scales else self.precision.loss_scale
        done = self.engine.update(self.experiment.training.clip, loss_finite, scale)
        overflow = self.precision.overflowed(loss_finite, done.finite)
        self.state.nonfinite = 0 if done.taken or overflow else self.state.nonfinite + 1
        if self.engine.scales:
            self.precision.follow(self.engine.loss_scale, overflow)
        else:
            self.precision.settle(overflow, done.finite)
        return done.norm

    # ---- afterwards

    def whole(self) -> nn.Module:
        """The student whole, on the main process: where it is sharded, made again and filled from the last checkpoint.

        Nothing is gathered for it, so no other process takes part.

        Raises:
            RunFailed: it is sharded, and its last checkpoint could not be written.
        """
        if not self.engine.sharded:
            return without_projections(self.unwrapped)
        self.saver.finish()
        newest = self.saver.last
        if newest is None or newest.name != checkpoints.NAME.format(self.state.step):
            raise RunFailed("the student is shared out over processes, and is put together from its last checkpoint, "
                            f"which could not be written to {self.folder.checkpoints}.\n  -> make room there and start "
                            "the same command again: the run goes on from "
                            + ("its beginning" if newest is None else newest.name))
        model = whole_student(self.experiment.form, self.unwrapped)
        attach_projections(self.experiment.objective, self.experiment.seed, model, self.teacher_config)
        checkpoints.load_whole(newest, model)
        return without_projections(model)

    def release(self) -> None:
        """Give models and optimizer back, so that the next training of this process finds the memory free."""
        self.engine.release()
        self.engine = self.teacher = self.cached = self.distillation = None
        self.evaluate = self.saver = self.memory = self.plan = None
        self.accelerator.free_memory()

    # ---- helpers

    def _evaluates(self) -> bool:
        """Whether the step that was done last is followed by an evaluation."""
        step = self.state.step
        return step > 0 and (step % self.experiment.training.evaluate_every == 0 or step == self.steps)

    def _lacks_evaluation(self) -> bool:
        """Whether the run ended after a step was saved and before the evaluation that belongs to it was done."""
        if not self._evaluates():
            return False
        done = self.ranks.main and any(
            line["step"] == self.state.step and "held_out" in line for line in read_lines(self.folder.metrics))
        return not any(self.ranks.gather_objects([done]))

    def _evaluate(self, metrics: Metrics, progress: ProgressReporter) -> None:
        """Evaluate and tell, or stop."""
        found = self.evaluate(self.student, self.state.step)
        if found is None:
            self.saver.stop(self.state, self.experiment.name)
        metrics.write({"step": self.state.step, "held_out": found})
        self._track({f"held_out/{name}": value for name, value in found.items()})
        progress.say(f"step {self.state.step}/{self.steps}  held-out {found['bits_per_byte']:.4f} bits per byte")

    def _autocast(self) -> AbstractContextManager:
        return self.precision.autocast(self.engine.casts)

    def _resident(self) -> list[object]:
        """What holds memory between steps."""
        teacher = self.teacher if self.cached is None else self.cached.head
        return [*self.engine.resident(), *([] if teacher is None else [teacher])]

    def _saved_now(self) -> str:
        """Write a checkpoint of this moment; says what is safe."""
        self.saver.save(self.state)
        self.saver.finish()
        newest = self.saver.last
        return "no checkpoint could be written" if newest is None else f"{newest.name} is saved"

    def _say(self, text: str) -> None:
        if self.ranks.main:
            console.print(f"{self.experiment.name}  {text}")

    def _log(self, record: dict[str, Any], metrics: Metrics, progress: ProgressReporter) -> None:
        record["tokens_per_second"] = record["tokens"] / record["seconds"]
        record["memory_peak"], record["memory_kind"] = memory_peak(self.accelerator.device)
        if "nonfinite" in record:
            progress.say(f"step {self.state.step}: non-finite loss or gradient, step skipped "
                         f"{record['nonfinite'] or ''}")
        if record.get("empty_steps") == 1:
            progress.say(f"step {self.state.step}: no target token in the whole batch, so that there is no loss and "
                         "nothing is learned; more such steps are counted in metrics.jsonl as empty_steps, and not "
                         "told")
        metrics.write({name: _plain(value) for name, value in record.items()})
        self._track({name: value for name, value in record.items() if isinstance(value, (int, float))})
        progress.step(self.state.step, record)

    def _track(self, values: dict[str, float]) -> None:
        if not self._tracks:
            return
        try:
            self.accelerator.log(values, self.state.step)
        except OSError as error:  # a full disk, for example: no reason to end a run
            self._tracks = False
            console.print(f"{self.experiment.name}  warning: trackers are told no more, since one cannot write: "
                          f"{error.strerror or error}; metrics.jsonl has everything")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mean(total: float, tokens: int) -> float:
    """A mean in fp32, as the terms of a loss are."""
    return float(np.float32(total) / np.float32(tokens))

"""The loop: batches in, one optimizer step after another, through Accelerate. Reads from top to bottom."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PretrainedConfig

from strategies.distillation.losses.response import IGNORED
from strategies.distillation.losses.teacher_targets import SharedVocabulary
from strategies.distillation.on_policy import written_rows
from strategies.distillation.step import Distillation
from strategies.distillation.tokenizers.input_adapters import TeacherInputAdapter, identity_adapter
from strategies.memory.meter import mark
from strategies.quantization.qat import set_bits
from trainer import checkpoints
from trainer.checkpoints.random_state import seed_everything
from trainer.data.batches import Batch, training_batches
from trainer.data.dataset import PreparedData
from trainer.distributed import signals
from trainer.distributed.launch import engine_for, place_teacher
from trainer.distributed.watchdog import Watch
from trainer.errors import RunFailed
from trainer.experiment.experiment import Experiment
from trainer.models.build import shape_of, whole_student
from trainer.models.router_balance import balancing_weight
from trainer.planning.step_memory import without_gradient
from trainer.planning.step_plan import measured_step, plan_step, report_memory
from trainer.run.folder import RunFolder
from trainer.run.metrics import Metrics, ProgressReporter, console, memory_peak, read_lines
from trainer.teacher.intermediate_losses import attach_projections, build_intermediate, without_projections
from trainer.teacher.loss import loss_of_batch
from trainer.teacher.target_cache import CachedTargets, uses_teacher
from trainer.training.evaluation import check_held_out, evaluate
from trainer.training.memory_check import keep_budget
from trainer.training.nonfinite import Backward, diagnosis, locate_nonfinite
from trainer.training.saving import checkpoints_of, resume, save, stop

LEAVING = 10.0  # seconds that a run which ends early waits for the checkpoint it was committing
MEASURED = 3  # the step of a process, counted from 1, whose memory is measured: state exists, DDP has its buckets


class Trainer:
    """Trains a student, with or without a teacher, and remembers all it needs to go on after an interruption.

    Attributes:
        engine: holds the student and its optimizer on their ranks; `student` is what is called.
        steps: optimizer steps of the whole run.
        step: optimizer steps done.
        nonfinite: steps in a row, up to now, whose loss or gradient was not finite.
        empty_steps: steps without any target token, ever.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, accelerator: Accelerator, text: PreparedData,
                 student: nn.Module, teacher: nn.Module | CachedTargets | None, steps: int,
                 teacher_config: PretrainedConfig | None = None,
                 related: tuple[SharedVocabulary | None, TeacherInputAdapter] = (None, identity_adapter)):
        self.experiment, self.folder, self.accelerator, self.text = experiment, folder, accelerator, text
        check_held_out(text)
        self.teacher_config = teacher_config
        objective = experiment.objective.build(teacher is not None)
        self.cached = teacher if isinstance(teacher, CachedTargets) else None
        live = teacher if self.cached is None and uses_teacher(experiment) else None
        shapes = shape_of(student), None if live is None else shape_of(live)  # while they are whole
        self.teacher = None if live is None else place_teacher(experiment, accelerator, live)
        self.precision = experiment.precision.build(accelerator.device.type)
        self.learning_rate = experiment.schedule.build(experiment.optimizer.lr, steps)
        self.engine = engine_for(experiment, accelerator, student,
                                 lambda: without_gradient(experiment, teacher_config, student.config))
        self.distillation = Distillation(
            objective, self.unwrapped, self.teacher, shapes=shapes, common=related[0], reader=related[1],
            intermediate=build_intermediate(experiment, self.unwrapped, self.teacher),
            balancing=balancing_weight(experiment.objective, self.unwrapped.config))
        self.steps, self.step, self.nonfinite, self.empty_steps = steps, 0, 0, 0
        self.watch = Watch(accelerator.process_index, accelerator.num_processes, experiment.run.timeout)
        batch, processes = experiment.training.batch_size, accelerator.num_processes
        self.accumulation = batch // (experiment.training.micro_batch * processes)
        self.memory = plan_step(self)
        self.backward = Backward(self.unwrapped)
        seed_everything(experiment.seed * 1_000_003 + accelerator.process_index + 1)  # dropout, apart on each process
        self.checkpoints = checkpoints_of(self)
        resume(self)
        self._measured_at = min(self.step + MEASURED, self.steps) - 1
        self._tracks = bool(experiment.run.trackers)  # teacher and control, trained by the way, have none

    @property
    def student(self) -> nn.Module:
        """The student as it is called in training, whatever wraps it."""
        return self.engine.model

    @property
    def unwrapped(self) -> nn.Module:
        """The student itself, without wrappers: for saving and evaluation afterwards, never for training."""
        return self.engine.student

    @property
    def asked(self) -> nn.Module | None:
        """What is there of the teacher: all of it, its head alone, or nothing."""
        return self.teacher if self.cached is None else self.cached.head

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The student's optimizer."""
        return self.engine.optimizer

    def train(self) -> None:
        """Train from `step` to `steps`, evaluating and saving on the way.

        Raises:
            Stopped: a signal asked for it.
            BudgetUnmet: a measured step took more than the budget, and is to stop the run.
            RunFailed: too many steps were not finite, weights are not, or another process is missing.
        """
        settings = self.experiment.training
        metrics = Metrics(self.folder.metrics, self.accelerator.is_main_process, self.step)
        progress = ProgressReporter(self.experiment.name, self.steps, self.step, self.experiment.run.log_every,
                        self.accelerator.is_main_process)
        if self.step:
            progress.say(f"resumed at step {self.step}")
        batches = self._batches()
        try:
            with signals.defer_signals(), self.watch.on():
                if self._lacks_evaluation():
                    self._evaluate(metrics, progress)
                while self.step < self.steps:
                    record = measured = None
                    if self.step == self._measured_at:
                        record, measured = measured_step(self, batches)
                    else:
                        record = self.train_step(batches)
                    if record is None:
                        stop(self)
                    self.step += 1
                    self._log(record, metrics, progress)
                    if measured is not None and "empty" not in record:
                        keep_budget(self, report_memory(self, measured, metrics, progress), metrics, progress)
                    if self._evaluates():
                        self._evaluate(metrics, progress)
                    if self.step % settings.checkpoint_every == 0 or self.step == self.steps:
                        save(self)
                    if self.nonfinite >= settings.nonfinite_limit:
                        save(self)
                        self.finish_saving()
                        raise RunFailed(diagnosis(record, self.nonfinite, self.folder.checkpoints))
                self.finish_saving()
                if self.empty_steps:
                    progress.say(f"{self.empty_steps} of {self.steps} steps had no target token and taught nothing")
        finally:
            self.checkpoints.finish(LEAVING)
            progress.close()
            metrics.close()

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any] | None:
        """One optimizer step over `accumulation` micro-batches on every process; returns what to log.

        The loss is the objective's sum over all target tokens of the step divided by their number, over micro-batches
        and processes, so it does not depend on how the batch is split. None where a process was asked to stop, on which
        all agree before anything has changed.
        """
        started = time.perf_counter()
        self._set_bits(self.step)
        learning_rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        number = self.step + 1
        self.watch.at(f"the batch of step {number}")
        micro_batches = [next(batches) for _ in range(self.accumulation)]
        if self._writes(self.step):
            self.watch.at(f"the texts that the student writes for step {number}")
            micro_batches = [self._written(batch, index) for index, batch in enumerate(micro_batches)]
        loss_mask = sum((batch["targets"] != IGNORED).sum() for batch in micro_batches)
        self.watch.at(f"the sum of target tokens of step {number}")
        asked = torch.tensor(signals.asked() is not None)
        tokens, stops = self.total(torch.stack([loss_mask, asked.to(loss_mask)]).to(self.accelerator.device))
        if stops:
            return None
        if not tokens:
            return self._empty(learning_rate, started)
        sums: dict[str, torch.Tensor] = {}
        finite: list[torch.Tensor] = []
        for index, batch in enumerate(map(self.to_device, micro_batches), 1):  # one at a time on the device
            self.watch.at(f"the gradients of step {number}, micro-batch {index}")
            last = index == self.accumulation
            with self.engine.accumulating(last):
                if last:
                    mark("forward")
                loss, terms = self._loss(batch)
                # Engines average gradients over processes; the sum over their tokens is wanted.
                share = loss * (self.accelerator.num_processes / tokens)
                if last:
                    mark("backward")
                self.engine.backward(share if self.engine.scales else self.precision.scale(share))
            finite.append(self.backward.finite(loss))
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value
        self.watch.at(f"the sum of losses of step {number}")
        means = {name: float(self.total(value) / tokens) for name, value in sums.items()}
        self.watch.at(f"the update of step {number}")
        mark("update")
        norm = self._update(math.isfinite(means["loss"]))
        record = self._record(means, norm, learning_rate, int(tokens))
        if self.nonfinite:
            record["nonfinite"] = locate_nonfinite(self.accelerator, micro_batches, finite)
        record["seconds"] = time.perf_counter() - started
        return record

    def _record(self, means: dict[str, float | None], norm: float | None, learning_rate: float, tokens: int
                ) -> dict[str, Any]:
        """What a step is remembered by."""
        return {"step": self.step + 1, **means, "gradient_norm": norm, "learning_rate": learning_rate,
                "tokens": tokens, "loss_scale": self.precision.loss_scale, "skipped": self.precision.skipped,
                "growths": self.precision.growths}

    def _empty(self, learning_rate: float, started: float) -> dict[str, Any]:
        """A step in which no process has a target token: there is no loss, and nothing moves but the schedule."""
        self.empty_steps += 1
        return {**self._record({"loss": None}, None, learning_rate, 0), "empty": True, "empty_steps": self.empty_steps,
                "seconds": time.perf_counter() - started}

    def _set_bits(self, step: int) -> None:
        """Give quantized layers the bits of a step, where they have a schedule."""
        asked = self.experiment.student.quantization
        bits = asked and asked.bits_at(step, self.steps)
        if bits:
            set_bits(self.unwrapped, bits)

    def _writes(self, step: int) -> bool:
        """Whether a step is on what the student writes; the same on every process."""
        asked = self.experiment.objective.on_policy
        return asked is not None and random.Random(f"{self.experiment.seed} {step}").random() < asked.fraction

    def _written(self, batch: Batch, number: int) -> Batch:
        """Rows that the student goes on with by itself, in place of a micro-batch."""
        asked, tokenizer = self.experiment.objective.on_policy, self.text.tokenizer
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        seed = ((self.experiment.seed * self.steps + self.step) * self.accumulation + number) * processes + rank
        there = batch["row"] >= 0  # the end of the run may lie in this batch
        if not there.any():
            return {**batch, "written": torch.ones(())}
        with self.precision.autocast(self.engine.casts):
            given = self.to_device({name: batch[name][there] for name in ("input_ids", "position_ids", "targets")})
            rows = written_rows(self.unwrapped, given, prompt_tokens=asked.prompt_tokens,
                                new_tokens=asked.new_tokens, temperature=asked.temperature, seed=seed,
                                end=tokenizer.eos_token_id, padding=tokenizer.pad_token_id)
        whole = {name: batch[name].to(tensor.device).index_put((there.nonzero()[:, 0].to(tensor.device),), tensor)
                 for name, tensor in rows.items()}
        return {**batch, **whole, "written": torch.ones(())}

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        teacher_targets = None if self.cached is None else self.cached(batch)
        distillation = self.distillation.without_text() if "written" in batch else self.distillation
        return loss_of_batch(distillation, self.precision, self.student, batch, self.engine.casts, teacher_targets)

    def _update(self, loss_finite: bool) -> float:
        """Clip, step the weights if everything is finite, and return the gradient's norm before clipping."""
        scale = 1.0 if self.engine.scales else self.precision.loss_scale
        done = self.engine.update(self.experiment.training.clip, loss_finite, scale)
        overflow = self.precision.overflowed(loss_finite, done.finite)
        self.nonfinite = 0 if done.taken or overflow else self.nonfinite + 1
        if self.engine.scales:
            self.precision.follow(self.engine.loss_scale, overflow)
        else:
            self.precision.settle(overflow, done.finite)
        return done.norm

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is committed or given up; of other processes only their threads are needed."""
        self.checkpoints.finish()

    def whole(self) -> nn.Module:
        """The student whole, on the main process: where it is sharded, made again and filled from the last checkpoint.

        Nothing is gathered for it, so no other process takes part.

        Raises:
            RunFailed: it is sharded, and its last checkpoint could not be written.
        """
        if not self.engine.sharded:
            return without_projections(self.unwrapped)
        self.finish_saving()
        newest = self.checkpoints.last
        if newest is None or newest.name != checkpoints.NAME.format(self.step):
            raise RunFailed("the student is shared out over processes, and is put together from its last checkpoint, "
                            f"which could not be written to {self.folder.checkpoints}.\n  -> make room there and start "
                            "the same command again: the run goes on from "
                            + ("its beginning" if newest is None else newest.name))
        model = whole_student(self.experiment, self.unwrapped)
        attach_projections(self.experiment, model, self.teacher_config)
        checkpoints.load_whole(newest, model)
        return without_projections(model)

    def release(self) -> None:
        """Give models and optimizer back, so that the next training of this process finds the memory free."""
        self.engine.release()
        self.engine = self.teacher = self.cached = self.distillation = None
        self.accelerator.free_memory()

    # ---- helpers

    def _evaluates(self) -> bool:
        """Whether the step that was done last is followed by an evaluation."""
        return self.step > 0 and (self.step % self.experiment.training.evaluate_every == 0 or self.step == self.steps)

    def _lacks_evaluation(self) -> bool:
        """Whether the run ended after a step was saved and before the evaluation that belongs to it was done."""
        if not self._evaluates():
            return False
        done = self.accelerator.is_main_process and any(
            line["step"] == self.step and "held_out" in line for line in read_lines(self.folder.metrics))
        return not any(gather_object([done]))

    def _evaluate(self, metrics: Metrics, progress: ProgressReporter) -> None:
        """Evaluate and tell, or stop."""
        found = evaluate(self)
        if found is None:
            stop(self)
        metrics.write({"step": self.step, "held_out": found})
        self._track({f"held_out/{name}": value for name, value in found.items()})
        progress.say(f"step {self.step}/{self.steps}  held-out {found['bits_per_byte']:.4f} bits per byte")

    def _batches(self) -> Iterator[Batch]:
        training = self.experiment.training
        with signals.block_signals_in_children():
            return training_batches(
                self.text.train, seed=self.experiment.seed, micro_batch=training.micro_batch,
                rank=self.accelerator.process_index, processes=self.accelerator.num_processes,
                skip=self.step * training.batch_size, workers=self.experiment.data.workers,
                pin=self.accelerator.device.type == "cuda",
                end=training.seen(len(self.text.train)) if training.epochs else None,
            )

    def to_device(self, batch: Batch) -> Batch:
        """A batch on this process's device."""
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, reduction="sum")

    def _log(self, record: dict[str, Any], metrics: Metrics, progress: ProgressReporter) -> None:
        record["tokens_per_second"] = record["tokens"] / record["seconds"]
        record["memory_peak"], record["memory_kind"] = memory_peak(self.accelerator.device)
        if "nonfinite" in record:
            progress.say(f"step {self.step}: non-finite loss or gradient, step skipped {record['nonfinite'] or ''}")
        if record.get("empty_steps") == 1:
            progress.say(
                f"step {self.step}: no target token in the whole batch, so that there is no loss and nothing is "
                "learned; more such steps are counted in metrics.jsonl as empty_steps, and not told"
            )
        metrics.write({name: _plain(value) for name, value in record.items()})
        self._track({name: value for name, value in record.items() if isinstance(value, (int, float))})
        progress.step(self.step, record)

    def _track(self, values: dict[str, float]) -> None:
        if not self._tracks:
            return
        try:
            self.accelerator.log(values, self.step)
        except OSError as error:  # a full disk, for example: no reason to end a run
            self._tracks = False
            console.print(f"{self.experiment.name}  warning: trackers are told no more, since one cannot write: "
                          f"{error.strerror or error}; metrics.jsonl has everything")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

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

from strategies.distillation.on_policy import written_rows
from strategies.distillation.reading import Reader, as_it_is
from strategies.distillation.response import IGNORED, ResponseObjective
from strategies.distillation.step import Distillation
from strategies.distillation.targets import Common
from strategies.memory.meter import mark
from strategies.quantization.qat import set_bits
from trainer import checkpoints
from trainer.data.batches import Batch, model_inputs, training_batches
from trainer.data.dataset import Text
from trainer.engines import engine_for, place_teacher
from trainer.errors import RunFailed
from trainer.experiment.tree import Experiment
from trainer.folder import RunFolder
from trainer.inside import attach_projections, build_inside, without_projections
from trainer.metrics import Metrics, Ticker, memory_peak
from trainer.models import shape_of, whole_student
from trainer.planned_step import measured_step, plan_step, tell_memory
from trainer.step_loss import loss_of_batch
from trainer.targets import CachedTargets, asks

MEASURED = 3  # the step of a process, counted from 1, whose memory is measured: state exists, DDP has its buckets


class Trainer:
    """Trains a student, with or without a teacher, and remembers all it needs to go on after an interruption.

    Attributes:
        engine: holds the student and its optimizer on their ranks; `student` is what is called.
        steps: optimizer steps of the whole run.
        step: optimizer steps done.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, accelerator: Accelerator, text: Text,
                 student: nn.Module, teacher: nn.Module | CachedTargets | None, steps: int,
                 teacher_config: PretrainedConfig | None = None,
                 related: tuple[Common | None, Reader] = (None, as_it_is)):
        self.experiment, self.folder, self.accelerator, self.text = experiment, folder, accelerator, text
        self.teacher_config = teacher_config
        objective = experiment.objective.build(teacher is not None)
        self.cached = teacher if isinstance(teacher, CachedTargets) else None
        live = teacher if self.cached is None and asks(experiment) else None
        shapes = shape_of(student), None if live is None else shape_of(live)  # while they are whole
        self.teacher = None if live is None else place_teacher(experiment, accelerator, live)
        self.precision = experiment.precision.build(accelerator.device.type)
        self.learning_rate = experiment.schedule.build(experiment.optimizer.lr, steps)
        self.engine = engine_for(experiment, accelerator, student)
        self.distillation = Distillation(
            objective, self.unwrapped, self.teacher, shapes=shapes, common=related[0], reader=related[1],
            inside=build_inside(experiment, self.unwrapped, self.teacher))
        self.steps, self.step, self.nonfinite = steps, 0, 0
        batch, processes = experiment.training.batch_size, accelerator.num_processes
        self.accumulation = batch // (experiment.training.micro_batch * processes)
        self.memory = plan_step(self)
        torch.manual_seed(experiment.seed * 1_000_003 + accelerator.process_index + 1)  # dropout, apart on each process
        self._resume()
        self._measured_at = min(self.step + MEASURED, self.steps) - 1

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
        """Train from `step` to `steps`, evaluating and saving on the way."""
        settings = self.experiment.training
        metrics = Metrics(self.folder.metrics, self.accelerator.is_main_process, self.step)
        ticker = Ticker(self.experiment.name, self.steps, self.step, self.experiment.run.log_every,
                        self.accelerator.is_main_process)
        if self.step:
            ticker.say(f"resumed at step {self.step}")
        batches = self._batches()
        try:
            while self.step < self.steps:
                measured = None
                if self.step == self._measured_at:
                    record, measured = measured_step(self, batches)
                else:
                    record = self.train_step(batches)
                self.step += 1
                self._log(record, metrics, ticker)
                if measured is not None:
                    tell_memory(self, measured, metrics, ticker)
                if self.step % settings.evaluate_every == 0 or self.step == self.steps:
                    found = self.evaluate()
                    metrics.write({"step": self.step, "held_out": found})
                    self._track({f"held_out/{name}": value for name, value in found.items()})
                    ticker.say(f"step {self.step}/{self.steps}  held-out {found['bits_per_byte']:.4f} bits per byte")
                if self.step % settings.checkpoint_every == 0 or self.step == self.steps:
                    self.save()
                if self.nonfinite >= settings.nonfinite_limit:
                    self.save()
                    raise RunFailed(self._diagnosis(record))
        finally:
            ticker.close()
            metrics.close()

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step over `accumulation` micro-batches on every process; returns what to log.

        The loss is the objective's sum over all target tokens of the step divided by their number, over micro-batches
        and processes, so it does not depend on how the batch is split.
        """
        started = time.perf_counter()
        self._set_bits(self.step)
        learning_rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        micro_batches = [next(batches) for _ in range(self.accumulation)]
        if self._writes(self.step):
            micro_batches = [self._written(batch, number) for number, batch in enumerate(micro_batches)]
        learnt = sum((batch["targets"] != IGNORED).sum() for batch in micro_batches)
        tokens = self._total(learnt.to(self.accelerator.device))
        sums: dict[str, torch.Tensor] = {}
        finite: list[torch.Tensor] = []
        for number, batch in enumerate(map(self._to_device, micro_batches), 1):  # one at a time on the device
            last = number == self.accumulation
            with self.engine.accumulating(last):
                if last:
                    mark("forward")
                loss, terms = self._loss(batch)
                # Engines average gradients over processes; the sum over their tokens is wanted.
                share = loss * (self.accelerator.num_processes / tokens)
                if last:
                    mark("backward")
                self.engine.backward(share if self.engine.scales else self.precision.scale(share))
            finite.append(loss.detach().isfinite())
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value
        means = {name: float(self._total(value) / tokens) for name, value in sums.items()}
        mark("update")
        norm = self._update(math.isfinite(means["loss"]))
        record = {"step": self.step + 1, **means, "gradient_norm": norm, "learning_rate": learning_rate,
                  "tokens": int(tokens), "loss_scale": self.precision.loss_scale, "skipped": self.precision.skipped,
                  "growths": self.precision.growths}
        if self.nonfinite:
            record["nonfinite"] = self._culprits(micro_batches, finite)
        record["seconds"] = time.perf_counter() - started
        return record

    def _set_bits(self, step: int) -> None:
        """Give quantised layers the bits of a step, where they have a schedule."""
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
        with self.precision.autocast(self.engine.casts):
            rows = written_rows(self.unwrapped, self._to_device(batch), prompt_tokens=asked.prompt_tokens,
                                new_tokens=asked.new_tokens, temperature=asked.temperature, seed=seed,
                                end=tokenizer.eos_token_id, padding=tokenizer.pad_token_id)
        return {**batch, **rows, "written": torch.ones(())}

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        taught = None if self.cached is None else self.cached(batch)
        distillation = self.distillation.without_text() if "written" in batch else self.distillation
        return loss_of_batch(distillation, self.precision, self.student, batch, self.engine.casts, taught)

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

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Bits per byte and cross-entropy per token (nats) on held-out rows, the same on any number of processes."""
        rows, size = self.text.held_out, self.experiment.training.micro_batch
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        wide = torch.float32 if self.accelerator.device.type == "mps" else torch.float64  # which Apple's GPUs lack
        sums = torch.zeros(2, dtype=wide, device=self.accelerator.device)
        text = Distillation(ResponseObjective(divergences=()), self.unwrapped, shapes=self.distillation.shapes)
        self.student.eval()
        for begin in range(0, len(rows["input_ids"]), size * processes):
            part = slice(begin + rank * size, begin + (rank + 1) * size)
            batch = self._to_device({name: tensor[part] for name, tensor in rows.items()})
            if not len(batch["input_ids"]):  # every process takes part in every forward; this one's rows are used up
                batch = self._to_device({name: tensor[:1] for name, tensor in rows.items()})
                batch["targets"] = torch.full_like(batch["targets"], IGNORED)
            with self.precision.autocast(self.engine.casts):
                sums[0] += text(self.student, model_inputs(batch), batch["targets"])[0].to(wide)
            sums[1] += (batch["targets"] != IGNORED).sum()
        self.student.train()
        nats, tokens = (float(value) for value in self._total(sums))
        return {"bits_per_byte": nats / math.log(2) / max(1, int(rows["bytes"].sum())), "cross_entropy": nats / tokens}

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        checkpoints.save(
            self.folder.checkpoints, self.step, self.engine,
            {"precision": self.precision.state_dict(), "engine": self.engine.scale_state(), "nonfinite": self.nonfinite,
             "processes": self.accelerator.num_processes},
            keep=self.experiment.training.keep_checkpoints, rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes, wait=self.accelerator.wait_for_everyone,
        )

    def whole(self) -> nn.Module:
        """The student whole, on the main process: where it is sharded, made again and filled from the last checkpoint.

        Nothing is gathered for it, so no other process takes part.
        """
        if not self.engine.sharded:
            return without_projections(self.unwrapped)
        model = whole_student(self.experiment, self.unwrapped)
        attach_projections(self.experiment, model, self.teacher_config)
        newest = checkpoints.latest(self.folder.checkpoints)
        assert newest is not None, "the last step writes a checkpoint"
        checkpoints.load_whole(newest, model)
        return without_projections(model)

    def release(self) -> None:
        """Give models and optimizer back, so that the next training of this process finds the memory free."""
        self.engine.release()
        self.engine = self.teacher = self.cached = self.distillation = None
        self.accelerator.free_memory()

    # ---- helpers

    def _resume(self) -> None:
        newest = checkpoints.latest(self.folder.checkpoints)
        state = wrong = None
        try:
            if newest is not None:
                state = checkpoints.load(newest, self.engine, self.accelerator.process_index)
        except checkpoints.Unreadable as error:
            wrong = str(error)
        self._check_resumed(None if newest is None else newest.name, wrong)
        if state is not None:
            self.engine.refresh()
            self.precision.load_state_dict(state["precision"])
            self.engine.load_scale_state(state["engine"], self.precision.loss_scale)
            self.step, self.nonfinite = state["step"], 0  # a restart is a new chance for a step that was not finite

    def _check_resumed(self, name: str | None, wrong: str | None) -> None:
        """Raise `RunFailed` on every process where one of them could not read the checkpoint, or reads another one."""
        every = gather_object([(name, wrong)])
        if len({name for name, _ in every}) > 1:
            raise RunFailed(f"the processes see different checkpoints in {self.folder.checkpoints}: "
                            f"{', '.join(str(name) for name, _ in every)}.\n  -> use a run.folder on storage that all "
                            "machines share")
        wrong = next((wrong for _, wrong in every if wrong is not None), None)
        if wrong is not None:
            before = sorted(self.folder.checkpoints.glob("step-*"))[:-1]
            raise RunFailed(f"the checkpoint {self.folder.checkpoints / name} cannot be gone on from: {wrong}.\n"
                            "  -> move that folder away and start the same command again: the run then goes on from "
                            + (f"{before[-1].name}, the checkpoint before it" if before else "its beginning"))

    def _batches(self) -> Iterator[Batch]:
        training = self.experiment.training
        return training_batches(
            self.text.train, seed=self.experiment.seed, micro_batch=training.micro_batch,
            rank=self.accelerator.process_index, processes=self.accelerator.num_processes,
            skip=self.step * training.batch_size, workers=self.experiment.data.workers,
            pin=self.accelerator.device.type == "cuda",
        )

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def _total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, reduction="sum")

    def _culprits(self, micro_batches: list[Batch], finite: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Process, micro-batch and rows whose loss is not finite; empty where only a gradient is not."""
        own = torch.stack([flag.long() for flag in finite])
        rows = torch.stack([batch["row"] for batch in micro_batches]).to(own.device)
        flags, every = self.accelerator.gather(own[None]), self.accelerator.gather(rows[None])
        return [{"process": process, "micro_batch": number, "rows": every[process, number].tolist()}
                for process, number in torch.argwhere(flags == 0).tolist()]

    def _diagnosis(self, record: dict[str, Any]) -> str:
        what = "loss" if record["nonfinite"] else "gradient"
        where = "".join(f"; process {one['process']}, micro-batch {one['micro_batch']}, rows {one['rows']}"
                        for one in record["nonfinite"][:4])
        return (f"the {what} was not finite for {self.nonfinite} steps in a row, last at step {self.step}{where}.\n"
                f"  No such step reached the weights; they are safe in {self.folder.checkpoints}.\n"
                "  -> lower optimizer.lr, set training.clip, or use precision.dtype bf16 or fp32; "
                "then start the same command again, or another run")

    def _log(self, record: dict[str, Any], metrics: Metrics, ticker: Ticker) -> None:
        record["tokens_per_second"] = record["tokens"] / record["seconds"]
        record["memory_peak"], record["memory_kind"] = memory_peak(self.accelerator.device)
        if "nonfinite" in record:
            ticker.say(f"step {self.step}: non-finite loss or gradient, step skipped {record['nonfinite'] or ''}")
        metrics.write({name: _plain(value) for name, value in record.items()})
        self._track({name: value for name, value in record.items() if isinstance(value, (int, float))})
        ticker.step(self.step, record)

    def _track(self, values: dict[str, float]) -> None:
        if self.experiment.run.trackers:  # teacher and control, trained by the way, have none
            self.accelerator.log(values, self.step)


def _plain(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Held-out text, on which a student is evaluated while it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.step import Distillation
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.distributed import signals
from trainer.errors import UserError

if TYPE_CHECKING:  # pragma: no cover - the loop imports this module
    from trainer.training.loop import Trainer


def check_held_out(text: PreparedData) -> None:
    """Raise `UserError` for held-out rows in which nothing is to be predicted: their loss of 0.0 would be none."""
    if not (text.held_out["targets"] != IGNORED).any():
        raise UserError("data.validation", "no held-out row has a target token: all of them are prompt or padding",
                        way_out="hold out more rows (data.validation.rows), or raise data.sequence_length, so that "
                        "responses are not cut off")


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float] | None:
    """Bits per byte and cross-entropy per token (nats) on held-out rows, the same on any number of processes.

    None where a process was asked to stop, on which all agree before each micro-batch.
    """
    rows, size, device = trainer.text.held_out, trainer.experiment.training.micro_batch, trainer.accelerator.device
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
    sums = torch.zeros(2, dtype=wide, device=device)
    text = Distillation(ResponseObjective(divergences=()), trainer.unwrapped, shapes=trainer.distillation.shapes)
    trainer.student.eval()
    for begin in range(0, len(rows["input_ids"]), size * processes):
        trainer.watch.at(f"held-out rows from {begin} on, after step {trainer.step}")
        if trainer.total(torch.tensor(int(signals.asked() is not None), device=device)):
            trainer.student.train()
            return None
        part = slice(begin + rank * size, begin + (rank + 1) * size)
        batch = trainer.to_device({name: tensor[part] for name, tensor in rows.items()})
        if not len(batch["input_ids"]):  # every process takes part in every forward; this one's rows are used up
            batch = trainer.to_device({name: tensor[:1] for name, tensor in rows.items()})
            batch["targets"] = torch.full_like(batch["targets"], IGNORED)
        with trainer.precision.autocast(trainer.engine.casts):
            sums[0] += text(trainer.student, model_inputs(batch), batch["targets"])[0].to(wide)
        sums[1] += (batch["targets"] != IGNORED).sum()
    trainer.student.train()
    trainer.watch.at(f"the held-out loss after step {trainer.step}")
    nats, tokens = (float(value) for value in trainer.total(sums))
    return {"bits_per_byte": nats / math.log(2) / max(1, int(rows["bytes"].sum())), "cross_entropy": nats / tokens}

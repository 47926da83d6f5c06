"""Quantising a student after its training: calibrated on its text, within a budget of bytes where there is one."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import torch
from torch import nn

from strategies.export.receipt import comparison_shape
from strategies.export.sizes import exported_bytes
from strategies.quantization import post_training
from strategies.quantization.allocation import Allocation, allocate, curve, draw_curve, rows, uniform
from strategies.quantization.sensitivity import Sensitivity, measure
from trainer.data.batches import Order, model_inputs
from trainer.data.dataset import Text
from trainer.data.rows import StreamedRows
from trainer.errors import blame
from trainer.experiment.quantization import Quantization
from trainer.experiment.tree import Experiment
from trainer.folder import RunFolder, write_atomically
from trainer.full_precision import ignored, without_place
from trainer.metrics import console, readable
from trainer.models import DTYPES, student_of
from trainer.weight_digests import check_digests, digests_of

SENSED = 8  # rows that the sensitivity of layers is measured on


def served(experiment: Experiment, model: nn.Module, text: Text, folder: RunFolder) -> nn.Module:
    """The student as it is written: quantised now, where that was to wait for the end of training.

    Args:
        model: whole, on one process; the one that is returned where nothing is left to do.
        text: whose training rows calibrate it.
        folder: keeps which bits were allotted, and the curve they were chosen from.

    Raises:
        UserError: too few rows, or a budget that cannot be met.
    """
    asked = experiment.student.quantization
    if asked is None or asked.trained:
        return model
    fresh = student_of(experiment, model.config)  # without what training has made of its blocks
    fresh.load_state_dict(model.state_dict())
    check_digests(digests_of(model), fresh, "the student, made again to be quantised,")
    fresh.generation_config = model.generation_config
    fresh.to(next(model.parameters()).device).eval()
    dtype = DTYPES[experiment.export.dtype]
    console.print(f"{experiment.name}: quantising ({asked.method})")
    batches = calibration(experiment, text, asked.calibration_rows, fresh)
    ignore = ignored(asked, without_place(fresh, asked, dtype))
    rules = asked.rules(dtype) if asked.budget is None else _allotted(
        experiment, fresh, batches, folder, ignore).rules
    with blame("student.quantization.calibration_rows", value=asked.calibration_rows, way_out="give more rows"):
        post_training.quantize(
            fresh, batches, asked.build(dtype), method=asked.method, ignore=ignore, rules=rules,
            activations=asked.activations and asked.activations.build(), smooth=asked.smooth,
            embeddings=asked.embeddings)
    return fresh


def calibration(experiment: Experiment, text: Text, count: int, model: nn.Module) -> list[dict[str, Any]]:
    """Inputs of the model for the first rows of the training text, in the order of the run's seed."""
    if isinstance(text.train, StreamedRows):
        chosen = list(islice(text.train.rows(), count))
    else:
        order = Order(len(text.train), experiment.seed)
        chosen = [text.train[order[number]] for number in range(min(count, len(text.train)))]
    device = next(model.parameters()).device
    stacked = {name: torch.stack([row[name] for row in chosen]).to(device) for name in ("input_ids", "position_ids")}
    size = experiment.training.micro_batch
    return [model_inputs({name: tensor[begin:begin + size] for name, tensor in stacked.items()})
            for begin in range(0, len(chosen), size)]


def _allotted(experiment: Experiment, model: nn.Module, batches: list[dict[str, Any]], folder: RunFolder,
              ignore: tuple[str, ...]) -> Allocation:
    """Bits for each layer, by what quantising it alone does to the model's predictions."""
    asked = experiment.student.quantization
    assert asked is not None and asked.bytes is not None
    console.print(f"{experiment.name}: measuring how sensitive layers are")
    found = sensitivity(experiment, model, batches, asked.model_copy(update={"ignore": ignore}))
    rest = exported_bytes(model, DTYPES[experiment.export.dtype]) - sum(
        model.get_parameter(f"{names[0]}.weight").numel() for names in found.layers) * DTYPES[
            experiment.export.dtype].itemsize
    with blame("student.quantization.budget", value=asked.budget, way_out="allow more bytes"):
        chosen = allocate(found, asked.bytes - rest)
    every, even = curve(found), uniform(found)
    write_atomically(folder.allocation, json.dumps({
        "budget": asked.bytes, "rest": rest, "chosen": chosen.to_json(), "curve": rows(every),
        "uniform": rows(even)}, indent=2) + "\n")
    draw_curve(every, even, folder.allocation.with_suffix(".png"))
    console.print(f"{experiment.name}: {readable(rest + chosen.bytes)} of {readable(asked.bytes)} on disk; the "
                  f"divergence is to rise by {chosen.rise:.3g} nats a token")
    return chosen


def sensitivity(experiment: Experiment, model: nn.Module, batches: list[dict[str, Any]], asked: Quantization
                ) -> Sensitivity:
    """How far predictions move, KL(before || after) in nats a token, where one layer alone is quantised."""
    count, length = comparison_shape(SENSED, batches[0]["input_ids"].shape[1], model.config.vocab_size)
    part = {name: tensor[:count, :length] if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in batches[0].items()}
    with torch.no_grad():
        before = model(**part).logits.float().log_softmax(-1)

    def divergence(model: nn.Module) -> float:
        after = model(**part).logits.float().log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).double().mean())

    dtype = DTYPES[experiment.export.dtype]
    return measure(model, asked.candidates(dtype), divergence, asked.ignore, asked.embeddings,
                   asked.activations and asked.activations.build(), dtype)

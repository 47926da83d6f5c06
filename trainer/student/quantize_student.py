"""Post-training quantization of the student: calibrated on its training text, optionally with bits set by a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.common.blockwise_calibration import counted_tokens
from strategies.common.generation_settings import copy_generation_settings
from strategies.common.model_tasks import task_of
from strategies.export.quantized_layers import quantized_layers
from strategies.export.receipt import comparison_shape
from strategies.export.sizes import exported_bytes, header_bound
from strategies.quantization import post_training
from strategies.quantization.allocation import Allocation, allocate, curve, draw_curve, rows, uniform
from strategies.quantization.sensitivity import Sensitivity, measure
from trainer.data.batches import model_inputs
from trainer.data.dataset import PreparedData
from trainer.data.first_rows import first_rows
from trainer.errors import UserError, error_context
from trainer.experiment.experiment import Experiment
from trainer.experiment.quantization_nodes import Quantization
from trainer.files import write_atomically
from trainer.models.build import DTYPES, empty_student, export_skeleton
from trainer.models.full_precision import ignored, without_place
from trainer.run.folder import RunFolder
from trainer.run.metrics import console, readable
from trainer.run.quantization_loss import keep_together
from trainer.run.working import working
from trainer.student.merge_adapter import merged_student
from trainer.student.weight_digests import check_digests, digests_of

SENSED = 8  # most rows on which the sensitivity of layers is measured


def finalize_student(experiment: Experiment, model: nn.Module, text: PreparedData, folder: RunFolder) -> nn.Module:
    """The student to export: merged with its adapters, and quantized here if it is to be quantized after training.

    A student whose adapter is exported alone stays as it is, unless another runtime needs the whole.

    Args:
        model: the unsharded student, on one process; returned unchanged if nothing is left to do.
        text: the data, whose training rows are used for calibration.
        folder: receives the bits allocated to each layer and the curve they were chosen from.

    Raises:
        UserError: there are too few calibration rows, or the budget cannot be met.
    """
    asked, export = experiment.student.quantization, experiment.export
    if export.adapter == "separate" and not export.to:
        return model
    if experiment.student.adapter is not None:
        model = merged_student(experiment.form, model)
    if asked is None or asked.trained:
        return model
    # Without the schedules that training installed in its blocks:
    fresh = empty_student(experiment.form.merged, model.config)
    fresh.load_state_dict(model.state_dict())
    check_digests(digests_of(model), fresh, "the student, made again to be quantized,")
    copy_generation_settings(model, fresh)
    fresh.to(next(model.parameters()).device).eval()
    dtype = DTYPES[experiment.export.dtype]
    batches = calibration(text, asked.calibration_rows, experiment.seed, experiment.training.micro_batch,
                          next(fresh.parameters()).device)
    ignore = ignored(asked, without_place(fresh, asked, dtype))
    rules = asked.rules(dtype) if asked.budget is None else _allotted(
        experiment, fresh, batches, folder, ignore).rules
    moved = None if asked.budget is None else divergence_from(fresh, batches)
    with working(experiment.name, f"quantizing ({asked.method})", at_once=True), error_context(
            "student.quantization.calibration_rows", value=asked.calibration_rows, way_out="give more rows"):
        post_training.quantize(
            fresh, batches, asked.build(dtype), method=asked.method, ignore=ignore, rules=rules,
            activations=asked.activations and asked.activations.build(), smooth=asked.smooth,
            embeddings=asked.embeddings)
    if moved is not None:
        keep_together(folder, moved(fresh), text)
    return fresh


def check_calibration(experiment: Experiment, config: PretrainedConfig, text: PreparedData) -> None:
    """Raise `UserError` before training if GPTQ will have fewer calibration tokens than a layer has inputs."""
    asked = experiment.student.quantization
    if asked is None or asked.trained or asked.method != "gptq" or experiment.data.task == "image_classification":
        return  # how many patches an image has, GPTQ finds out
    with torch.device("meta"):
        widest, name = max((layer.matrix.shape[1], name) for name, layer in quantized_layers(
            export_skeleton(experiment.form, config)) if not isinstance(layer, nn.Embedding))
    batches = calibration(text, asked.calibration_rows, experiment.seed, experiment.training.micro_batch,
                          torch.device("cpu"))
    rows = sum(len(batch["input_ids"]) for batch in batches)
    tokens = counted_tokens(batches)
    if tokens < widest:
        needed = -(-widest * rows // tokens)
        enough = not hasattr(text.train, "__len__") or len(text.train) >= needed
        raise UserError("student.quantization.calibration_rows", f"{rows} rows have {tokens:,} tokens, and {name} has "
                        f"{widest:,} inputs: GPTQ needs as many tokens at least", value=asked.calibration_rows,
                        way_out=f"give {needed} or more" if enough else "take `method: rtn`, or more text")


def calibration(text: PreparedData, count: int, seed: int, micro_batch: int, device: torch.device
                ) -> list[dict[str, Any]]:
    """Calibration batches: model inputs for the first `count` training rows, in the order of the run's seed."""
    rows = {name: tensor.to(device) for name, tensor in first_rows(text, count, seed).items()}
    return [model_inputs({name: tensor[begin:begin + micro_batch] for name, tensor in rows.items()})
            for begin in range(0, len(rows["targets"]), micro_batch)]


def _allotted(experiment: Experiment, model: nn.Module, batches: list[dict[str, Any]], folder: RunFolder,
              ignore: tuple[str, ...]) -> Allocation:
    """Allocate bits to each layer within the byte budget, by its sensitivity; writes the allocation and its curve."""
    asked = experiment.student.quantization
    assert asked is not None and asked.bytes is not None
    with working(experiment.name, "measuring how sensitive layers are", at_once=True):
        found = sensitivity(DTYPES[experiment.export.dtype], model, batches,
                            asked.model_copy(update={"ignore": ignore}))
    rest = exported_bytes(model, DTYPES[experiment.export.dtype]) - sum(
        model.get_parameter(f"{names[0]}.weight").numel() for names in found.layers) * DTYPES[
            experiment.export.dtype].itemsize
    header = header_bound(model, asked.parts, [name for names in found.layers for name in names])
    with error_context("student.quantization.budget", value=asked.budget, way_out="allow more bytes"):
        chosen = allocate(found, asked.bytes - rest - header)
    every, even = curve(found), uniform(found)
    write_atomically(folder.allocation, json.dumps({
        "budget": asked.bytes, "rest": rest, "header": header, "chosen": chosen.to_json(), "curve": rows(every),
        "uniform": rows(even)}, indent=2) + "\n")
    draw_curve(every, even, folder.allocation.with_suffix(".png"))
    console.print(f"{experiment.name}: at most {readable(rest + header + chosen.bytes)} of {readable(asked.bytes)} on "
                  "disk")
    return chosen


def sensitivity(dtype: torch.dtype, model: nn.Module, batches: list[dict[str, Any]], asked: Quantization
                ) -> Sensitivity:
    """The sensitivity of each layer: KL(before || after) in nats per token when only that layer is quantized."""
    divergence = divergence_from(model, batches)
    return measure(model, asked.candidates(dtype), divergence, asked.ignore, asked.embeddings,
                   asked.activations and asked.activations.build(), dtype)


def divergence_from(model: nn.Module, batches: list[dict[str, Any]]) -> Callable[[nn.Module], float]:
    """A function that measures KL(before || after) in nats per token, or row of a classifier, on the first rows.

    `before` is `model` as it is now; `after` is the model that the function is called with.
    """
    part: dict[str, Any] = dict(batches[0])
    if task_of(model.config) == "causal_lm":
        count, length = comparison_shape(SENSED, batches[0]["input_ids"].shape[1], model.config.vocab_size)
        part = {name: tensor[:count, :length] if isinstance(tensor, torch.Tensor) else tensor
                for name, tensor in batches[0].items()}
    with torch.no_grad():
        before = model(**part).logits.float().log_softmax(-1)

    @torch.no_grad()
    def divergence(model: nn.Module) -> float:
        after = model(**part).logits.float().log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).double().mean())

    return divergence

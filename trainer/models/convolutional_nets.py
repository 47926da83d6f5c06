"""What convolutional nets need of the settings: batch norms rows and whole models, and stages no calibration."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from strategies.common.running_statistics import batch_norms
from trainer.errors import UserError
from trainer.experiment.experiment import StudentForm
from trainer.models.build import from_config
from trainer.models.layer_widths import has_maps


def check_convolutional(student: PretrainedConfig, form: StudentForm, micro_batch: int, engine: str) -> None:
    """Raise `UserError` if the student is a convolutional net that cannot be trained or quantized as its form says.

    A single row has no statistics for batch norms: where a map is one pixel it would be divided by a variance of zero.
    The sharding engines keep running statistics apart on each rank, and ZeRO rounds them to the dtype in which it
    computes. Calibration goes through a list of equal blocks.

    Args:
        student: its configuration.
        form: how it is quantized.
        micro_batch: rows of a micro-batch.
        engine: what holds the student on its ranks, as in `sharding.engine`.
    """
    asked = form.quantization
    if has_maps(student) and asked is not None and asked.group_size is not None:
        raise UserError("student.quantization.group_size", "the kernels of a convolutional net have a scale for each "
                        "output", value=asked.group_size, way_out="leave it out")
    if has_maps(student) and asked is not None and (asked.method == "gptq" or asked.smooth is not None):
        key = "method" if asked.method == "gptq" else "smooth"
        raise UserError(f"student.quantization.{key}", "calibration goes block by block, and the stages of "
                        f"{student.model_type} differ from each other", value=getattr(asked, key),
                        way_out="use `method: rtn`" + (", or leave smooth out" if key == "smooth" else ""))
    if has_maps(student) and asked is not None and asked.budget is not None:
        raise UserError("student.quantization.budget", "files of transformers hold each number of a convolutional net "
                        "in a byte, whatever its bits, so that there is nothing to choose", value=asked.budget,
                        way_out="give `bits` in its place; files for ONNX Runtime are smaller with fewer")
    with torch.device("meta"):
        model = from_config(student, form.trust)
    if not batch_norms(model):
        return
    name = type(model).__name__
    if micro_batch == 1:
        raise UserError("training.micro_batch", f"{name} has batch norms, which normalize by the statistics of a "
                        "micro-batch, and one row has none", value=1, way_out="use 2 or more, 16 say")
    if engine in ("fsdp2", "zero"):
        raise UserError("sharding.engine", f"{name} has batch norms, whose running statistics {engine} does not bring "
                        "together", value=engine, way_out="use ddp, which does; the memory of such a model is in its "
                        "activations, which memory.budget is for")

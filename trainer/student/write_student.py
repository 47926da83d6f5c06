"""Writes the exported student, and gives the logits that its receipt compares."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from strategies.export.hf.transformers_folder import write_folder
from strategies.quantization.freeze import freeze_quantized
from trainer.data.dataset import PreparedData
from trainer.experiment.experiment import StudentForm
from trainer.experiment.model_nodes import Student
from trainer.experiment.nodes import Export
from trainer.models.build import DTYPES
from trainer.student.compare_student import logits_of
from trainer.student.merge_adapter import check_merge, write_separate


def write_student(folder: Path, trained: nn.Module, model: nn.Module, student: Student, export: Export,
                  form: StudentForm, text: PreparedData) -> None:
    """Write the student as `export` asks, with its tokenizer.

    Args:
        trained: the student as training left it, perhaps with adapters.
        model: the same merged and quantized.
    """
    if export.adapter == "separate":
        write_separate(folder, trained, student, form, text.tokenizer)
    else:
        write_folder(folder, model, text.tokenizer, DTYPES[export.dtype])


def logits_to_compare(trained: nn.Module, model: nn.Module, student: Student, export: Export, text: PreparedData
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on held-out rows of the student in training, and of what the exported files have to reproduce.

    Args:
        trained, model: see `write_student`.

    Raises:
        RunFailed: what is merged does not compute what was trained.
    """
    if export.adapter == "separate":
        logits = logits_of(trained, text)
        return logits, logits
    dtype, exported = DTYPES[export.dtype], logits_of(model, text)
    before = exported if student.adapter is None else check_merge(student, export, logits_of(trained, text), exported)
    if dtype is not torch.float32:
        exported = logits_of(freeze_quantized(copy.deepcopy(model), dtype), text)
    return before, exported

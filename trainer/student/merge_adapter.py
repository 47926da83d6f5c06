"""Exports a student that was trained with adapters: merged into its base, or the adapter alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strategies.adapters.low_rank import merged, write_adapter
from strategies.export.hf.transformers_folder import write_folder
from strategies.export.receipt import TRANSFORMERS
from trainer.errors import RunFailed
from trainer.experiment.experiment import StudentForm
from trainer.experiment.model_nodes import Student
from trainer.experiment.nodes import Export
from trainer.models.build import DTYPES, empty_student
from trainer.models.quantized_base import quantized_base

BASE = "base"  # folder within the student's, of a base that is exported with its adapter


def merged_student(form: StudentForm, model: nn.Module) -> nn.Module:
    """A student of its own without adapters, in fp32, that computes what a student with adapters computes.

    The base counts as it was held in training: of 4-bit numbers, the merged student has their exact values.
    """
    device = next(model.parameters()).device
    plain = merged(model, empty_student(form.merged, model.config).to(device))
    plain.generation_config = model.generation_config
    return plain.train(model.training)


def check_merge(student: Student, export: Export, trained: torch.Tensor, exported: torch.Tensor
                ) -> torch.Tensor:
    """The logits of the adapted model in training, checked against those of the merged one unless that is quantized.

    Raises:
        RunFailed: they differ by more than `export.tolerance`.
    """
    allowed = export.tolerance * float(trained.abs().max())
    found = float((trained - exported).abs().max())
    if student.quantization is None and not found <= allowed:
        raise RunFailed(f"the student with its adapters merged differs from the one in training by {found:.3g} in a "
                        f"logit, over export.tolerance {export.tolerance:g} of the largest\n"
                        "  -> the checkpoint is safe; set export.adapter: separate")
    return trained


def export_notes(student: Student, export: Export, trained: torch.Tensor, exported: torch.Tensor) -> list[str]:
    """What the receipt says of adapters: what a merge into few bits loses, or which base an adapter needs."""
    adapter = student.adapter
    if adapter is None:
        return []
    if export.adapter == "separate" and adapter.is_exported:
        return [f"the adapter, and in {BASE}/ its base with the numbers that it was trained on"]
    if export.adapter == "separate":
        base = {"float32": "as its files have it, computed in float32"}.get(adapter.base, f"held in {adapter.base}")
        return [f"the adapter alone, for {student.path} {base}"]
    if student.quantization is None:
        return []
    before, after = trained.log_softmax(-1), exported.log_softmax(-1)
    lost = float((before.exp() * (before - after)).sum(-1).double().mean())
    again = ", the base's numbers made anew" if adapter.is_exported else ""
    return [f"quantized after the adapter was merged{again}: {lost:.3g} nats per token (KL) from the adapted model in "
            f"training, {(trained.argmax(-1) == exported.argmax(-1)).float().mean():.2%} of predictions the same"]


def write_separate(folder: Path, model: nn.Module, student: Student, form: StudentForm, tokenizer: Any) -> None:
    """Write the adapter alone, with the tokenizer; an interrupted export leaves none that looks finished.

    A base that is held as it is exported is written beside it, into a folder within.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if form.adapter is not None and form.adapter.is_exported:
        plain = empty_student(form.merged, model.config).to(next(model.parameters()).device)
        write_folder(partial / BASE, quantized_base(form, model, plain), tokenizer, DTYPES[form.dtype],
                     beneath_adapter=True)
        write_adapter(partial, model, BASE)
    else:
        assert student.path is not None
        local = Path(student.path)  # wherever the adapter is loaded from
        write_adapter(partial, model, str(local.resolve()) if local.exists() else student.path, student.revision)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def client_of(export: Export, task: str) -> str:
    """The script that loads the exported student in a fresh process."""
    if task != "causal_lm":
        return "classifier_client.py"
    return "peft_client.py" if export.adapter == "separate" else "transformers_client.py"


def libraries_of(student: Student, export: Export) -> tuple[str, ...]:
    """The libraries that load the exported student."""
    adapter = student.adapter
    if adapter is None or export.adapter != "separate":
        return TRANSFORMERS
    return *TRANSFORMERS, "peft", *(("bitsandbytes",) if adapter.base == "nf4" else ())


def student_entry(student: Student, export: Export, folder: Path) -> dict[str, Any]:
    """What that script is to load of an exported folder."""
    if export.adapter != "separate":
        return {"path": str(folder)}
    assert student.adapter is not None
    if student.adapter.is_exported:
        return {"path": str(folder / BASE), "dtype": "float32", "adapter": str(folder), "base": "float32"}
    return {"path": student.path, "revision": student.revision, "dtype": "float32", "adapter": str(folder),
            "base": student.adapter.base}

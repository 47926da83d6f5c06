"""A student that is cut before it is trained: made once, written as a plain folder, reloaded and compared."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strategies.export.hf.transformers_folder import write_folder
from trainer.checkpoints import WarmStart
from trainer.data.dataset import PreparedData
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.experiment import Experiment
from trainer.experiment.model_nodes import Student, Teacher
from trainer.experiment.sparsity_nodes import Sparsity
from trainer.files import fingerprint, write_atomically
from trainer.models.build import build_student, build_teacher
from trainer.models.configs import student_config, teacher_config
from trainer.models.task_heads import Task
from trainer.preparation import Launched
from trainer.run.cut_report import zeros_in_words
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import in_words
from trainer.run.metrics import console, readable
from trainer.run.working import working
from trainer.student.compare_student import ask_about, logits_of
from trainer.student.merge_adapter import client_of
from trainer.student.prune_student import prune_student
from trainer.student.quantize_student import calibration

RECORD = "prune.json"
TOLERANCE = 1e-5  # of the largest logit: a reloaded cut beside the one in memory
VERSION = 1  # of what is cut how; a folder of another one is made again

# Cuts a model, perhaps in place, and returns it with what was done, as plain data for the record.
Cutter = Callable[[nn.Module, PreparedData], tuple[nn.Module, dict[str, Any]]]


def cutters_of(experiment: Experiment) -> list[tuple[str, Cutter]]:
    """What is done to the student before it is trained, each by the name that the record has it under."""
    found: list[tuple[str, Cutter]] = []
    if (prune := experiment.student.prune) is not None:
        found.append(("prune", lambda model, text: prune_student(
            prune, model, text, experiment.seed, experiment.training.micro_batch)))
    if (sparsity := experiment.student.sparsity) is not None and sparsity.is_one_shot:
        found.append(("sparsity", lambda model, text: _pruned(experiment, sparsity, model, text)))
    return found


def _pruned(experiment: Experiment, asked: Sparsity, model: nn.Module, text: PreparedData
            ) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights set to zero, and the record of it."""
    trained = None
    if asked.trained is not None:
        if not (Path(asked.trained) / "config.json").is_file():
            raise UserError("student.sparsity.trained", f"there is no model in {asked.trained}", value=asked.trained,
                            way_out="name the folder `student` of the run of the round before")
        student = experiment.student.starting_from(asked.trained)
        trained = origin_of(experiment.model_copy(update={"student": student}), text).get_parameter
    batches = calibration(text, asked.calibration_rows, experiment.seed, experiment.training.micro_batch,
                          next(model.parameters()).device)
    with error_context("student.sparsity", value=asked.method, way_out="change it, or `calibration_rows`, or name the "
                       "layers in `ignore`"):
        return model, asked.cut(model, batches, trained)


def cut_first(experiment: Experiment, how: Launched, text: PreparedData, folder: RunFolder) -> Experiment:
    """The experiment whose student starts from what is left of it after cutting, which is made here once.

    The folder `cut` of the run is a plain model of transformers with the record `prune.json`; it appears as a whole,
    after it has been reloaded in a fresh process. A collective call; only the main process works.

    Args:
        experiment: with a teacher that has weights, if it has one.

    Raises:
        UserError: the student cannot be cut so.
        RunFailed: the reloaded cut computes something else; it stays in `.cut.unverified`.
    """
    if not experiment.student.is_cut:
        return experiment
    settings = experiment.student.model_dump(mode="json", exclude={"quantization", "adapter"})
    identity = fingerprint([VERSION, experiment.seed, text.identity, settings,
                            None if experiment.teacher is None else experiment.teacher.path])
    if how.accelerator.is_main_process and not _is_made(
            folder, identity, experiment.student, experiment.teacher):
        folder.lock(wait=False)
        _cut(experiment, how.accelerator.device, text, folder, identity)
    how.accelerator.wait_for_everyone()
    return experiment.from_cut(folder.cut)


def _is_made(folder: RunFolder, identity: str, student: Student, teacher: Teacher | None) -> bool:
    """Whether the cut is there, of the settings of now and of the weights of now.

    Once a run has trained it goes on from its own weights, and the cut stays what it began with: its zeros are those
    that are kept. What may still change then, such as the micro-batch, makes no other one.
    """
    if not (folder.cut / RECORD).is_file():
        return False
    record = read_json(folder.cut / RECORD)
    return folder.reached > 0 or folder.finished or (
        record.get("identity") == identity and record.get("origin") == _origin(student, teacher))


def _origin(student: Student, teacher: Teacher | None) -> list[list[str | int]]:
    """The files of weights that are cut, with sizes and times, by which others in the same place are told."""
    places = [student.path, teacher.path if teacher is not None and student.from_teacher is not None else None,
              None if student.sparsity is None else student.sparsity.trained,
              None if student.from_run is None else str(WarmStart(student).checkpoint)]
    files = [file for place in places if place for file in sorted(Path(place).glob("*.safetensors"))]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _cut(experiment: Experiment, device: torch.device, text: PreparedData, folder: RunFolder, identity: str
         ) -> None:
    name = experiment.name
    record: dict[str, Any] = {"identity": identity, "origin": _origin(experiment.student, experiment.teacher)}
    partial = folder.cut.with_name(".cut.unverified")
    with working(name, "loading what is cut", at_once=True):
        model = origin_of(experiment, text).to(device).eval()
    record["parameters_before"] = sum(one.numel() for one in model.parameters())
    for kind, cutter in cutters_of(experiment):
        with working(name, f"cutting the student ({kind})", at_once=True):
            model, record[kind] = cutter(model, text)
    record["parameters"] = sum(one.numel() for one in model.parameters())
    shutil.rmtree(partial, ignore_errors=True)
    write_folder(partial, model, text.tokenizer, torch.float32)
    expected = logits_of(model, text)
    del model
    gc.collect()
    with working(name, "reloading the cut in a fresh process and comparing", at_once=True):
        found, logits = ask_about(
            {"cut": {"path": str(partial), "compare": True, "trust_remote_code": experiment.form.trust}},
            experiment.training.micro_batch, experiment.report, text, expected, device.type,
            client=client_of(experiment.export, experiment.data.task), task=experiment.data.task,
            tokenizer=str(partial))
    difference = float((expected - logits["cut"]).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise RunFailed(f"the cut student, reloaded by transformers, differs from the one in memory by "
                        f"{difference:.3g} of its largest logit, over {TOLERANCE:g}; it is kept in {partial}")
    figures = {key: value for key, value in found["cut"].items() if isinstance(value, (int, float))}
    size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    write_atomically(partial / RECORD, json.dumps(
        {**record, "difference_reloaded": difference, "bytes_on_disk": size, "held_out": figures}, indent=2) + "\n")
    shutil.rmtree(folder.cut, ignore_errors=True)
    os.rename(partial, folder.cut)
    console.print(f"{name}: cut from {record['parameters_before']:,} to {record['parameters']:,} parameters"
                  f"{zeros_in_words(record)}, {readable(size)}; before any training {in_words(figures)}, see "
                  f"{folder.cut / RECORD}")


def origin_of(experiment: Experiment, text: PreparedData) -> nn.Module:
    """The model that a student starts as before it is cut, in fp32 and without quantization or adapters."""
    student = experiment.student.model_copy(update={"quantization": None, "adapter": None, "prune": None})
    own = experiment.model_copy(update={"student": student})
    task = Task.of(experiment.data, text.classes)
    above = teacher_config(experiment.teacher, text.vocabulary, task=task)
    config = student_config(student, above, text.vocabulary, task=task)
    teacher = None if student.teacher_layers is None else build_teacher(experiment.teacher, above)
    other = None if student.from_run is None else WarmStart(student)
    return build_student(own, config, teacher, text.tokenizer, other)

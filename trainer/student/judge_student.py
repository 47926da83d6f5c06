"""Judges the models of a run on tasks when it has ended: teacher, student as exported and before rounding, control."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from strategies.export.clients.peft_client import hold
from trainer.data.dataset import PreparedData
from trainer.data.tokenizers import own_tokenizer, vocabulary_size
from trainer.distributed.rank_group import RankGroup
from trainer.evaluate.asking import OneProcess, Reader, Sharers
from trainer.evaluate.harness import judge_by_harness
from trainer.evaluate.judge import Judgement, judge, key_of, read_tasks
from trainer.evaluate.results import as_text, compared
from trainer.experiment.evaluate_nodes import Evaluate
from trainer.experiment.model_nodes import Student, Teacher
from trainer.experiment.nodes import Export
from trainer.files import write_atomically
from trainer.models.build import build_teacher
from trainer.models.configs import teacher_config
from trainer.run.folder import RunFolder
from trainer.run.metrics import console
from trainer.run.working import working
from trainer.student.merge_adapter import student_entry
from trainer.teacher.vocabularies import reads_alike

Loader = Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]
Found = dict[str, dict[str, Judgement]]


def judge_run(asked: Evaluate, file: Path, loaders: dict[str, Loader], ranks: RankGroup, tokens: int, name: str
              ) -> None:
    """Judge the models of a run and write `evaluation.json`, as a whole or not at all. A collective call.

    The processes share the records of own tasks; those of lm-evaluation-harness are judged by the main one, after the
    others have what they need.

    Args:
        file: where to write.
        loaders: the models by name, see `models_of`.
        tokens: most tokens of a forward pass.
        name: of the experiment.
    """
    if asked.in_training:
        ranks.at("the models to judge on tasks")
        ranks.gather_objects([None])  # the main process has compared the student meanwhile
    found = judge_models(asked, loaders, ranks, tokens, name)
    if ranks.main:
        found = by_harness(asked, loaders, OneProcess(ranks.device), tokens, name, found)
        write_results(asked, found, file)
        say_results(name, found)


def models_of(teacher: Teacher | None, student: Student, export: Export, trust: bool, folder: RunFolder,
              text: PreparedData, device: torch.device, before: Callable[[], nn.Module]) -> dict[str, Loader]:
    """The models of a finished run by name, each with what loads it.

    Args:
        trust: whether code that comes with the student's model may run.
        before: makes the student as it was before it was quantized after training.
    """
    found: dict[str, Loader] = {}
    if teacher is not None:
        found["teacher"] = lambda: load_teacher(teacher, student, text, device)
    own = {**student_entry(student, export, folder.student), "trust_remote_code": trust}
    found["student"] = lambda: (load_exported(own, device), text.tokenizer)
    asked = student.quantization
    if asked is not None and not asked.trained and export.adapter != "separate":
        found["student before rounding"] = lambda: (before().to(device), text.tokenizer)
    if (control := RunFolder(folder.control)).student.exists():
        other = {**student_entry(student, export, control.student), "trust_remote_code": trust}
        found["control"] = lambda: (load_exported(other, device), text.tokenizer)
    return found


def load_teacher(teacher: Teacher, student: Student, text: PreparedData, device: torch.device
                 ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The teacher, with a tokenizer of its own where that is not the student's."""
    own = None if reads_alike(teacher, student, text) else own_tokenizer(teacher.path, teacher.revision)
    tokenizer = own or text.tokenizer
    return build_teacher(teacher, teacher_config(teacher, vocabulary_size(tokenizer))).to(device), tokenizer


def load_exported(entry: dict[str, Any], device: torch.device) -> nn.Module:
    """A model as transformers loads its folder, with its adapter if the entry names one; see `student_entry`."""
    options = {"revision": entry["revision"]} if entry.get("revision") else {}
    with redirect_stderr(io.StringIO()):  # hides the progress bars of quantized formats
        model = AutoModelForCausalLM.from_pretrained(
            entry["path"], dtype=entry.get("dtype", "auto"), use_safetensors=True,
            trust_remote_code=entry.get("trust_remote_code", False), **options)
    if entry.get("adapter"):
        from peft import PeftModel

        with torch.no_grad():
            hold(model, entry["base"], entry["adapter"])
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks for a renamed attribute
            model = PeftModel.from_pretrained(model, entry["adapter"]).get_base_model()
    model = model.to(device).eval()
    if hasattr(model.config, "quantization_config"):
        with redirect_stderr(io.StringIO()), torch.no_grad():  # the first call unpacks weights
            model(torch.ones((1, 1), dtype=torch.long, device=device))
    return model


def judge_models(asked: Evaluate, loaders: dict[str, Loader], ranks: Sharers, tokens: int, name: str) -> Found:
    """Judge models on the tasks that have files of their own, one model after the other."""
    records = read_tasks(asked)
    found: Found = {model: {} for model in loaders}
    for model, load in loaders.items() if records else ():
        with working(name, f"judging the {model} on tasks", at_once=True):
            loaded, tokenizer = load()
            reader = Reader(loaded, loaded, tokenizer, ranks, tokens)
            for one in records:
                judged = judge(reader, one, key_of(asked, one.task))
                assert judged is not None, "outside of training a signal ends the process by itself"
                found[model][one.task.name] = judged
            del loaded, reader
        _make_room()
    return found


def by_harness(asked: Evaluate, loaders: dict[str, Loader], alone: OneProcess, tokens: int, name: str, found: Found
               ) -> Found:
    """The same with what the models reach on the tasks of lm-evaluation-harness, on this process alone."""
    tasks = [task for task in asked.tasks if task.kind == "harness"]
    for model, load in loaders.items() if tasks else ():
        with working(name, f"judging the {model} by lm-evaluation-harness", at_once=True):
            loaded, tokenizer = load()
            for task in tasks:
                found[model][task.name] = judge_by_harness(Reader(loaded, loaded, tokenizer, alone, tokens), task)
            del loaded
        _make_room()
    return found


def write_results(asked: Evaluate, found: Found, file: Path) -> None:
    """Write what the models reached, side by side, as a whole."""
    write_atomically(file, as_text(compared(asked.tasks, read_tasks(asked), found)))


def say_results(name: str, found: Found) -> None:
    """Print the metrics of each model on each task."""
    for model, tasks in found.items():
        said = ", ".join(f"{task} {metric.replace('_', ' ')} {value:.4f}" for task, one in tasks.items()
                         for metric, value in one.values.items())
        console.print(f"{name}: {model}: {said}")


def _make_room() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

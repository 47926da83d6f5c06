"""Judges a folder with a model, or the exported student of a run, on tasks: `limbeck evaluate`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError

from trainer.data.tokenizers import load_tokenizer
from trainer.errors import ExperimentErrors, UserError
from trainer.evaluate.asking import OneProcess
from trainer.evaluate.check_tasks import check_prompts, check_tasks
from trainer.evaluate.judge import read_tasks
from trainer.evaluate.results import LIKE, as_text, compared
from trainer.experiment.evaluate_nodes import Evaluate
from trainer.experiment.load import mistakes, read_experiment
from trainer.experiment.plain_yaml import Key, read_values
from trainer.files import write_atomically
from trainer.model_files import check_files
from trainer.models.build import quiet_libraries
from trainer.models.task_heads import check_writes
from trainer.run.folder import RunFolder, read_json
from trainer.run.foreign_folder import only_if_trusted, show_links
from trainer.run.metrics import console
from trainer.student.judge_student import Loader, by_harness, judge_models, load_exported, say_results
from trainer.student.merge_adapter import student_entry


def judge_folder(path: Path, tasks: Path | None, limit: int | None = None, teacher: Path | None = None,
                 output: Path | None = None, tokens: int = 4096, trust_remote_code: bool = False) -> Path:
    """Judge a model on tasks, and write what it reached.

    Args:
        path: a folder that transformers can load, or a run's, whose exported student is meant.
        tasks: a YAML file with `tasks`, or an experiment with `evaluate`; None for those of the run.
        limit: use at most so many records of each task.
        teacher: another model, judged beside it, to give the difference on the same records.
        output: where to write; None for `evaluation.json` in the model's folder.
        tokens: most tokens of a forward pass.
        trust_remote_code: run code that comes with the model.

    Returns:
        The file that is written.

    Raises:
        UserError: there is no such model, or a mistake in the tasks or their files.
    """
    quiet_libraries()
    run = RunFolder(path)
    if tasks is None and not run.experiment.exists():
        raise UserError("--tasks", "no tasks are given", way_out="name a YAML file with `tasks`, as the section "
                        "`evaluate` of an experiment has them")
    asked, origins, file = read_asked(run.experiment if tasks is None else tasks)
    if limit is not None:
        asked = asked.model_copy(update={"tasks": tuple(
            task.model_copy(update={"limit": min(limit, task.limit or limit)}) for task in asked.tasks)})
    if tasks is None:
        asked = _of_run(asked, run, trust_remote_code)
    try:
        check_tasks(asked)
        loaders = {LIKE: _loader({"path": str(teacher)}, "--teacher", asked)} if teacher is not None else {}
        entry = _entry(run, path, trust_remote_code)
        loaders["student"] = _loader(entry, "folder", asked)
    except UserError as error:
        raise ExperimentErrors([error], origins, str(file)) if error.key.startswith("evaluate") else error from error
    alone, name = OneProcess(torch.device("cuda" if torch.cuda.is_available() else "cpu")), path.name
    found = judge_models(asked, loaders, alone, tokens, name)
    found = by_harness(asked, loaders, alone, tokens, name, found)
    say_results(name, found)
    output = output or Path(entry.get("adapter", entry["path"])) / "evaluation.json"
    write_atomically(output, as_text(_public(compared(asked.tasks, read_tasks(asked), found))))
    return output


def read_asked(file: Path) -> tuple[Evaluate, dict[Key, str], Path]:
    """The tasks of a file, with the places of their keys as if they were in an experiment.

    Raises:
        ExperimentErrors: all mistakes in them.
        UserError: there are none.
    """
    values, origins = read_values(file)
    if "evaluate" not in values:
        values, origins = {"evaluate": values}, {("evaluate", *key): place for key, place in origins.items()}
    try:
        asked = Evaluate.model_validate(values["evaluate"] or {})
    except ValidationError as error:
        found = mistakes(error, Evaluate)
        for one in found:
            one.key = f"evaluate.{one.key}" if one.key else "evaluate"
        raise ExperimentErrors(found, origins, str(file)) from error
    if not asked.tasks:
        raise UserError("--tasks", f"{file} has no tasks", way_out="write `tasks: [{name: ..., kind: ..., path: ...}]` "
                        "into it")
    return asked, origins, file


def _of_run(asked: Evaluate, run: RunFolder, trust: bool) -> Evaluate:
    """The tasks of a run's experiment, which may be somebody else's: what is read is printed, and no code is run."""
    for task in asked.tasks:
        for path in filter(None, (task.path, task.examples)):
            console.print(f"{run.path}: task {task.name} is read from {str(Path(path).resolve())!r}")
    return asked if trust else asked.model_copy(update={"tasks": tuple(
        task.model_copy(update={"trust_remote_code": False}) for task in asked.tasks)})


def _entry(run: RunFolder, path: Path, trust: bool) -> dict[str, Any]:
    """What is to be loaded of a folder."""
    if not path.is_dir():
        raise UserError("", "there is no such folder", value=str(path), way_out="name a folder with a model, or that "
                        "of a finished run")
    if not run.experiment.exists():
        return {"path": str(path), "trust_remote_code": trust}
    if not run.receipt.exists():
        raise UserError("", f"{path} is not the folder of a finished run",
                        way_out="finish it: start its command again")
    show_links(run)
    experiment = only_if_trusted(read_experiment(run.experiment).experiment, run, trust).from_cut(run.cut)
    return {**student_entry(experiment.student, experiment.export, run.student), "trust_remote_code": trust}


def _loader(entry: dict[str, Any], key: str, asked: Evaluate) -> Loader:
    """What loads a model with its tokenizer; the latter is tried at once."""
    where = entry.get("adapter", entry["path"])
    if not (Path(entry["path"]) / "config.json").is_file() and "adapter" not in entry:
        raise UserError("", f"{entry['path']} has no config.json, and so no model", way_out="name a folder that "
                        "transformers can load")
    if "adapter" not in entry:
        check_files(entry["path"], "")
        check_writes(SimpleNamespace(**{"architectures": None, **read_json(Path(entry["path"]) / "config.json")}), "",
                     entry["path"])
    tokenizer = load_tokenizer("", where, None)
    check_prompts(asked, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return lambda: (load_exported(entry, device), tokenizer)


def _public(found: dict[str, Any]) -> dict[str, Any]:
    """The results with names of files only: a model's folder is given away, and says nothing about a machine."""
    return {**found, "tasks": {name: {**one, **{key: Path(one[key]).name for key in ("path", "examples")
                                                if isinstance(one.get(key), str)}}
                               for name, one in found["tasks"].items()}}

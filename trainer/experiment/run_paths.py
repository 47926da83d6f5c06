"""Paths inside the folder of another run, from which a student may start (`student.from_run`)."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.errors import UserError
from trainer.experiment.plain_yaml import read_values

KEY = "student.from_run"
CHECKPOINTS, MODEL, STUDENT = "checkpoints", "model", "student"


def run_of(path: str) -> Path:
    """The run folder that a path names, itself or by one of its checkpoints."""
    given = Path(path)
    return given.absolute().parent.parent if given.absolute().parent.name == CHECKPOINTS else given


def model_of_run(path: str) -> Path:
    """The folder with a run's configuration and tokenizer; runs of earlier versions have them with the student only."""
    run = run_of(path)
    return run / MODEL if (run / MODEL).is_dir() else run / STUDENT


def check_run(path: str) -> None:
    """Raise `UserError` if there is no run at a path that has a checkpoint and says what its student looks like."""
    run, way_out = run_of(path), "name a run folder such as runs/NAME, or RUN/checkpoints/step-00000100"
    if not Path(path).is_dir():
        raise UserError(KEY, "there is no such folder", value=path, way_out=way_out)
    if not (run / "experiment.yaml").is_file():
        if (Path(path) / "config.json").is_file():
            way_out = "it is a model: name it in `student.path` instead"
        raise UserError(KEY, "this is neither a run folder nor a checkpoint of one", value=path, way_out=way_out)
    if adapted(run):
        raise UserError(KEY, "its checkpoints hold an adapter, without the weights beneath it", value=path,
                        way_out=f"name its merged student in `student.path`: {run / STUDENT}")
    if not any((run / CHECKPOINTS).glob("step-*")):
        raise UserError(KEY, "this run has no checkpoint yet", value=path,
                        way_out="start that run again, which writes one, or name another run")
    if not (model_of_run(path) / "config.json").is_file():
        raise UserError(KEY, f"the run does not say what its student looks like: {run / MODEL} is missing", value=path,
                        way_out="finish it with this version (start its command again), or put the folder back")


def adapted(run: Path) -> bool:
    """Whether a run trained an adapter; False where its experiment cannot be read, which is said elsewhere."""
    try:
        student = read_values(run / "experiment.yaml")[0].get("student")
    except ValueError:
        return False
    return isinstance(student, dict) and bool(student.get("adapter"))


def within(path: str, folder: str) -> bool:
    """Whether a path is a folder or inside of it."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))

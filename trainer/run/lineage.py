"""The runs that a student's weights come from, one before the other, as far as their folders are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.renamed import with_new_names
from trainer.experiment.run_paths import CHECKPOINTS, STUDENT, run_of
from trainer.run.folder import RunFolder, read_json


@dataclass(frozen=True)
class EarlierRun:
    """A run that weights come from.

    Attributes:
        folder: its folder.
        values: those of its experiment, as plain data.
        steps: optimizer steps after which the weights were taken.
    """

    folder: RunFolder
    values: dict[str, Any]
    steps: int

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return self.folder.path.absolute().name


def earlier_runs(folder: RunFolder, values: dict[str, Any]) -> list[EarlierRun]:
    """The runs before a run, the latest first: each is named by `student.from_run`, or by the path of its student.

    The chain ends at weights that no run made, at a folder that is missing, and at one that cannot be read.
    """
    found: list[EarlierRun] = []
    seen = {folder.path.resolve()}
    while (given := _origin(values)) is not None:
        try:
            run = _earlier(given, folder)
        except (UserError, ValueError, LookupError, TypeError, AttributeError, OSError):
            break
        if run is None or run.folder.path.resolve() in seen:
            break
        seen.add(run.folder.path.resolve())
        found.append(run)
        values = run.values
    return found


def _origin(values: dict[str, Any]) -> str | None:
    """The path that the weights of a student come from, its own or that of the teacher whose layers it has."""
    student = values["student"]
    model = values["teacher"] if student.get("from_teacher") is not None else student
    return student.get("from_run") or (model or {}).get("path")


def _earlier(given: str, folder: RunFolder) -> EarlierRun | None:
    """The run that a path names: itself, by one of its checkpoints, or by its exported student; None if there is none.

    A path that is relative was so to where the run was started, which is the folder of now or one above the run's.
    """
    for above in (Path(), *folder.path.absolute().parents):
        path = above / given
        exported = path.name == STUDENT
        run = RunFolder(path.parent if exported else run_of(str(path)))
        if run.experiment.is_file():
            experiment = Experiment.model_validate(with_new_names(read_values(run.experiment)[0]))
            return EarlierRun(run, experiment.model_dump(mode="json"), _steps(run, path, exported))
    return None


def _steps(run: RunFolder, path: Path, exported: bool) -> int:
    if path.absolute().parent.name == CHECKPOINTS:
        return int(path.name.removeprefix("step-"))
    best = read_json(run.best).get("step") if exported and run.best.exists() else None
    return best if isinstance(best, int) else run.reached or int(read_json(run.plan)["steps"])

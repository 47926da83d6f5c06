"""Precautions for untrusted run folders: show the paths they refer to, and require consent before running code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.run.folder import RunFolder
from trainer.run.metrics import console

TRUST = "--trust-remote-code"
# Paths that are read, or written to, after the training is over.
READ = {"data.path": "text", "data.validation.path": "held-out text", "data.tokenizer.path": "the tokenizer",
        "student.path": "the student's tokenizer", "student.from_run": "the student's tokenizer",
        "teacher.path": "the teacher's tokenizer",
        "run.cache": "what is cached (and written there)"}


def only_if_trusted(experiment: Experiment, folder: RunFolder, trust: bool) -> Experiment:
    """The experiment of a folder, with remote code enabled only if the command line allows it.

    Raises:
        UserError: the experiment needs code that ships with its model, and the command line does not allow it.
    """
    if trust:
        return experiment
    student, teacher = experiment.student, experiment.teacher
    if student.trust_remote_code or (student.from_teacher is not None and teacher.trust_remote_code):
        code = sorted(path.name for path in folder.student.glob("*.py")) or ["the code beside its model"]
        raise UserError(TRUST, f"{folder.experiment} asks to run Python code that comes with its model, and whoever "
                        "made the folder may have written it", way_out=f"read {', '.join(code)} in {folder.student}; "
                        f"if you trust it, add {TRUST}")
    if teacher is not None:  # it is not built any more
        others = tuple(one.model_copy(update={"trust_remote_code": False}) for one in teacher.others)
        teacher = teacher.model_copy(update={"trust_remote_code": False, "others": others})
    return experiment.model_copy(update={"teacher": teacher})


def show_links(folder: RunFolder) -> None:
    """Print the symlinks in a run folder that lead out of it, before they are followed."""
    for path in sorted(folder.path.rglob("*")):
        if path.is_symlink() and not _inside(path, folder):
            console.print(f"{folder.path}: {str(path.relative_to(folder.path))!r} leads to {str(path.resolve())!r}")


def show_paths(folder: RunFolder, experiment: Experiment) -> None:
    """Print the paths outside of its run folder that an experiment refers to, before they are read."""
    for line in _paths(experiment, folder):
        console.print(f"{folder.path}: {line}")


def _paths(experiment: Experiment, folder: RunFolder) -> Iterator[str]:
    values = experiment.model_dump(mode="json")
    for key, what in READ.items():
        if key == "data.path" and experiment.data.sources is not None:
            continue
        section, _, rest = key.partition(".")
        value = values.get(section)
        for name in rest.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and not _inside(Path(value), folder):
            yield f"{what} is read from {_place(value)!r} ({key})"
    for number, other in enumerate((values["teacher"] or {}).get("others", ())):
        if not _inside(Path(other["path"]), folder):
            yield f"another teacher's tokenizer is read from {_place(other['path'])!r} (teacher.others.{number}.path)"
    for number, source in enumerate(values["data"]["sources"] or ()):
        held_out = (source["validation"] or {}).get("path")
        for what, key, value in (("text", "path", source["path"]), ("held-out text", "validation.path", held_out)):
            if value is not None and not _inside(Path(value), folder):
                yield f"{what} is read from {_place(value)!r} (data.sources.{number}.{key})"


def _place(value: str) -> str:
    """An absolute path for anything local; hub ids and names of built-in data are returned unchanged."""
    return str(Path(value).resolve()) if Path(value).exists() or value.startswith((".", "/")) else value


def _inside(path: Path, folder: RunFolder) -> bool:
    return path.resolve().is_relative_to(folder.path.resolve())

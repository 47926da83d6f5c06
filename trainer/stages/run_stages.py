"""Run an experiment in stages: each is a run in a folder of its own, and starts from the student of the one before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer import pipeline
from trainer.errors import RunFailed, UserError
from trainer.experiment.explain import resolved_yaml
from trainer.experiment.load import Source, read_experiment
from trainer.files import write_atomically
from trainer.pipeline import run_experiment, with_teacher
from trainer.run.exit_report import FOLDER as EXITS
from trainer.run.folder import RunFolder
from trainer.run.held_out import in_words
from trainer.run.metrics import console, readable
from trainer.stages.check_stages import check_stages, located
from trainer.stages.show_stages import dry_run_stages
from trainer.stages.stage_record import (
    HandedOn,
    Made,
    StagesFolder,
    check_input,
    keep_input,
    made,
    metric_of,
    teacher_of,
    worse_by,
)
from trainer.stages.stage_report import write_stages_report
from trainer.stages.stage_settings import StageSettings, settings_of


@dataclass
class _Progress:
    """What has been made, stage by stage, as the record has it."""

    name: str
    stages: list[dict[str, Any]]
    teacher: dict[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        return {"name": self.name, "teacher": self.teacher, "stages": self.stages}


def run_stages(source: Source) -> Path:
    """Run all stages of an experiment, or go on with them, and return its folder.

    A stage that is finished is not run again; one that was interrupted resumes from its newest checkpoint.

    Raises:
        ExperimentErrors, UserError: a mistake in one of the stages; nothing has been started then.
        RunFailed: a stage failed; what the stages before it have made is kept.
    """
    folder = StagesFolder(source.experiment.folder)
    folder.check()
    planned = settings_of(source)
    check_stages(planned)
    main = int(os.environ.get("RANK", 0)) == 0
    if main:
        RunFolder(folder.path).lock(wait=False)
        if not folder.record.exists():  # first of all, since a folder with other files alone is taken for another's
            folder.write({"name": source.experiment.name, "teacher": None, "stages": []})
        if not folder.experiment.exists():
            _write_experiment(folder, source)
    stages = settings_of(_teacher_first(source))
    _check_folders(stages)
    if main:
        folder.report.unlink(missing_ok=True)
        _write_experiment(folder, source)
    progress, before = _Progress(source.experiment.name, []), None
    for stage in stages:
        say(f"{source.experiment.name}: stage {stage.number + 1} of {len(stages)}, {stage.kind}")
        with _placed(stage):
            if before is not None and stage.kind != "export":
                stage = stage.at(stage.folder, before.path)  # of one that is repeated, the round is known only now
            results = _rounds(stage, before) if stage.until else [_once(stage, before)]
        before = [one for one in results if one.kept][-1].student
        progress.stages.append({"label": stage.label, "kind": stage.kind, "made": [asdict(one) for one in results]})
        progress.teacher = progress.teacher or teacher_of(RunFolder(results[0].folder))
        if main:
            folder.write(progress.values())
            _tell(source.experiment.name, stage, results)
    if main:
        _hand_over(folder, Path(before.path))
        write_stages_report(folder.path)
        say(f"{source.experiment.name}: done, see {folder.report}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return folder.path


def _write_experiment(folder: StagesFolder, source: Source) -> None:
    write_atomically(folder.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                     f"{resolved_yaml(source.experiment)}")


def _check_folders(stages: Sequence[StageSettings]) -> None:
    """Raise `OtherRun` for stages that were begun with other values, before the report of all is taken away.

    Which student a stage after a repeated one starts from is not known yet.
    """
    for stage in stages:
        if stage.until is not None:
            return
        if stage.kind != "export":
            with _placed(stage):
                RunFolder(stage.folder).check(stage.source.experiment)


def run(source: Source) -> Path:
    """Run an experiment, in stages if it has some, or go on with it, and return its folder.

    Raises what `run_experiment` and `run_stages` raise.
    """
    return run_stages(source) if source.experiment.stages else run_experiment(source)


def dry_run(source: Source, as_json: bool) -> None:
    """Show what would run, in stages if there are some, without leaving any file.

    Raises what `pipeline.dry_run` and `dry_run_stages` raise.
    """
    (dry_run_stages if source.experiment.stages else pipeline.dry_run)(source, as_json)


def say(text: str) -> None:
    """Print a line on the main process."""
    if int(os.environ.get("RANK", 0)) == 0:
        console.print(text)


@contextmanager
def _placed(stage: StageSettings) -> Iterator[None]:
    """Give mistakes that a stage finds the places of its own settings."""
    try:
        yield
    except UserError as error:
        raise located(error, stage) from error


def _teacher_first(source: Source) -> Source:
    """The experiment with a teacher that has weights, which is trained once for all stages."""
    teacher = source.experiment.teacher
    if teacher is None or teacher.train is None:
        return source
    alone = source.experiment.model_copy(update={"stages": ()})
    ready = with_teacher(alone).model_copy(update={"stages": source.experiment.stages})
    if ready.data.tokenizer.train_vocabulary:  # the teacher brings it from now on
        ready = ready.model_copy(update={"data": ready.data.model_copy(update={
            "tokenizer": ready.data.tokenizer.model_copy(update={"train_vocabulary": None})})})
    return replace(source, experiment=ready)


def _once(stage: StageSettings, given: HandedOn | None, label: str | None = None) -> Made:
    """Run one stage, or one round of it."""
    folder = RunFolder(stage.folder)
    check_input(folder, given, stage.key)
    if stage.kind == "export":
        assert given is not None
        stage = _exported(stage, RunFolder(Path(given.path).parent))
    if given is not None and int(os.environ.get("RANK", 0)) == 0:
        keep_input(folder, given)
    run_experiment(stage.source, last=False)
    found = made(label or stage.label, folder)
    # An export has copies of the steps and the cut of the stage before, in whose row they are.
    return replace(found, steps=0, seconds=0.0, cut=None) if stage.kind == "export" else found


def _exported(stage: StageSettings, before: RunFolder) -> StageSettings:
    """An export as a run of its own: a copy of the run whose student it exports, of which files are made again."""
    folder = RunFolder(stage.folder)
    asked, recorded = stage.source.experiment, read_experiment(before.experiment, []).experiment
    own = recorded.model_copy(update={
        "name": asked.name, "run": asked.run, "export": asked.export, "report": asked.report,
        "evaluate": asked.evaluate})
    if not folder.path.exists() and int(os.environ.get("RANK", 0)) == 0:
        partial = folder.path.with_name(f".{folder.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(before.path, partial, copy_function=_linked, ignore=_left_out)
        write_atomically(partial / folder.experiment.name, resolved_yaml(
            recorded.model_copy(update={"name": asked.name, "run": asked.run})))
        os.rename(partial, folder.path)
    return replace(stage, source=replace(stage.source, experiment=own))


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Signs of life and locks of the run before, and what it wrote for other runtimes; exits come from training."""
    return {name for name in names if name.startswith((".", "student-")) and name != EXITS}


def _linked(source: str, target: str) -> str:
    """Share a file of weights, which nobody writes into, with the run before; copy others."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return target
        except OSError:  # another file system, or one without links
            pass
    return shutil.copy2(source, target)


def _rounds(stage: StageSettings, given: HandedOn | None) -> list[Made]:
    """Repeat a stage until its student is too much worse, and hand on the last one that is not."""
    assert stage.until is not None
    found: list[Made] = []
    for number in range(1, stage.until.rounds + 1):
        start = given if not found else found[-1].student
        own = stage.at(stage.folder / f"round-{number}", None if start is None else start.path)
        try:
            one = _once(own, start, f"{stage.label}/round-{number}")
        except UserError as error:
            # Only what all processes find from shapes: for others, the main one alone would stop.
            if not found or not error.key.startswith("student.prune.") or error.key.endswith(".importance"):
                raise
            say(f"{stage.label}: nothing more can be cut: {error.problem}")
            break
        reference = _reference(RunFolder(one.folder), given)
        metric = metric_of(one.student.figures, stage.until.metric)
        worse = worse_by(metric, one.student.figures[metric], reference[metric])
        one.kept = worse <= stage.until.drop
        found.append(one)
        say(f"{stage.label}: round {number}: {readable(one.student.bytes_on_disk)}, "
            f"{in_words(one.student.figures, metric)}, {worse:+.4f} worse than at first; at most {stage.until.drop:g}")
        if not one.kept:
            break
    if not any(one.kept for one in found):
        raise RunFailed(f"{stage.label}: the first round makes the student worse by more than `until.drop` "
                        f"({stage.until.drop:g}) already\n  -> cut less in a round, train it for longer, or allow more "
                        f"in {stage.key}.until.drop; then move {stage.folder} away")
    return found


def _reference(folder: RunFolder, given: HandedOn | None) -> dict[str, Any]:
    """What a round is compared with: the teacher, else the student that the stage began with."""
    found = teacher_of(folder)
    if found is not None:
        return found
    assert given is not None, "checked before anything started"
    return given.figures


def _hand_over(folder: StagesFolder, student: Path) -> None:
    """Put the last student beside the report, as a whole or not at all, with what it was compared with."""
    for name in ("comparison.json", "measured.json"):  # by which sweeps rank
        if (student.parent / name).exists():
            shutil.copy2(student.parent / name, folder.path / name)
    partial = folder.path / ".student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(student, partial)
    shutil.rmtree(folder.student, ignore_errors=True)
    os.rename(partial, folder.student)


def _tell(name: str, stage: StageSettings, results: list[Made]) -> None:
    last = [one for one in results if one.kept][-1].student
    console.print(f"{name}: {stage.label} hands on {last.path}: {readable(last.bytes_on_disk)}, "
                  f"{in_words(last.figures)}")

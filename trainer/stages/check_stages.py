"""All stages before the first one starts: each is planned with the shape of the student that it will start from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.early_checks import configs_of, vocabulary_of
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import Source
from trainer.experiment.task_checks import check_best
from trainer.models.build import quiet_libraries
from trainer.pipeline import planned
from trainer.planning.plan import Plan
from trainer.stages.stage_settings import StageSettings


def check_stages(stages: Sequence[StageSettings]) -> list[Plan]:
    """The plan of each stage; nothing is written but configurations, into a temporary folder.

    Raises:
        ExperimentErrors: a mistake that shows from the shapes of a stage; its key is that of the stage's experiment.
    """
    quiet_libraries()
    plans = []
    with tempfile.TemporaryDirectory(prefix="limbeck-stages-") as room:
        shape, above = None, Path(room) / "teacher"
        for stage in stages:
            source = stage.source if shape is None else _starting_from(stage.source, shape, above)
            try:
                _check_rounds(stage)
                plans.append(planned(source))
                shape = Path(room) / stage.label
                teacher, student = configs_of(source.experiment, vocabulary_of(source.experiment), offline=True)
                student.save_pretrained(shape)
                if teacher is not None:
                    teacher.save_pretrained(above)
            except UserError as error:
                raise located(error, stage) from error
    return plans


def located(error: UserError, stage: StageSettings) -> UserError | ExperimentErrors:
    """A mistake that a stage has found, with the place of the stage's own settings.

    Those that have exit codes and rules of their own, such as a budget that cannot be met, stay what they are.
    """
    error.problem += f" (in {stage.key}.{stage.kind})"
    return ExperimentErrors([error], stage.source.origins, stage.source.file) if type(error) is UserError else error


def _starting_from(source: Source, shape: Path, above: Path) -> Source:
    """A stage with models of these shapes, where those that it starts from are not there yet."""
    student, teacher, data = source.experiment.student, source.experiment.teacher, source.experiment.data
    if student.path is not None and not (Path(student.path) / "config.json").exists():
        student = student.model_copy(update={"path": str(shape)})
    if teacher is not None and teacher.train is not None:
        teacher = teacher.model_copy(update={"path": str(above), "train": None, "architecture": None})
        # The teacher brings the tokenizer that was trained for it.
        data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"train_vocabulary": None})})
    experiment = source.experiment.model_copy(update={"student": student, "teacher": teacher, "data": data})
    return replace(source, experiment=experiment)


def _check_rounds(stage: StageSettings) -> None:
    """Raise `UserError` if rounds have nothing to be compared with, or a figure that their models do not have."""
    experiment = stage.source.experiment
    if stage.until is None:
        return
    try:
        check_best(experiment.data, stage.until.metric)
    except UserError as error:
        error.key = f"{stage.key}.until.metric"
        raise
    if stage.number == 0 and experiment.teacher is None:
        raise UserError(f"{stage.key}.until", "there is neither a teacher nor a stage before, whose student the rounds "
                        "would be compared with", way_out="add `teacher` (with the path of the student, if it is the "
                        "same model)")

"""The experiment that each stage is: the file's settings, its own over them, and the student of the stage before."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import Source, mistakes
from trainer.experiment.model_nodes import ORIGINS
from trainer.experiment.plain_yaml import Key
from trainer.experiment.run_paths import STUDENT
from trainer.experiment.stage_nodes import Stage, Until
from trainer.files import flatten

TAKEN = {"name": "the stages are named by their numbers and kinds", "stages": "a stage has no stages of its own",
         "run.folder": "each stage has a folder of its own within that of the experiment",
         "run.cache": "all stages share one cache", "teacher.train": "one teacher is trained, for all stages",
         "data.tokenizer": "the student brings its tokenizer from stage to stage"}
AFTER = ("export", "report", "evaluate", "run")  # nodes that act on a finished student
OF_TRAINING = ("epochs", "keep_best", "early_stopping", "min_delta")
WORDS = {"prune": "student.prune or student.sparsity", "quantize": "student.quantization"}


@dataclass(frozen=True)
class StageSettings:
    """A stage that can be run.

    Attributes:
        number: its place, from 0.
        kind: prune, distill, quantize or export.
        source: its experiment, whose student starts from that of the stage before.
        folder: its folder; of one that is repeated, the folder of its rounds.
        until: how often it is repeated; None for once.
    """

    number: int
    kind: str
    source: Source
    folder: Path
    until: Until | None = None

    @property
    def key(self) -> str:
        """Where it stands in the file."""
        return f"stages.{self.number}"

    @property
    def label(self) -> str:
        """Its name, for example `2-distill`."""
        return f"{self.number + 1}-{self.kind}"

    @property
    def student(self) -> Path:
        """The folder of the student that it hands on, if it is not repeated."""
        return self.folder / STUDENT

    def at(self, folder: Path, student: str | None = None) -> StageSettings:
        """The same with another folder, and with another student to start from; None for its own."""
        experiment = self.source.experiment
        changes: dict[str, Any] = {"run": experiment.run.model_copy(update={"folder": str(folder)}),
                                   "name": f"{experiment.name}-{folder.name}" if folder != self.folder else
                                   experiment.name}
        if student is not None:
            changes["student"] = experiment.student.starting_from(student)
        source = replace(self.source, experiment=experiment.model_copy(update=changes))
        return replace(self, source=source, folder=folder)


def settings_of(source: Source) -> list[StageSettings]:
    """The stages of an experiment, each read as an experiment; `source` has a teacher with weights, or none, or trains.

    Raises:
        ExperimentErrors: settings of a stage that are no experiment, or an input that does not fit it.
    """
    found: list[StageSettings] = []
    if source.experiment.student.adapter is not None and len(source.experiment.stages) > 1:
        raise ExperimentErrors([UserError(
            "student.adapter", "it would be of the first stage alone", value=source.experiment.student.adapter.kind,
            way_out="write it into the stages that it is for")], source.origins, source.file)
    for number, stage in enumerate(source.experiment.stages):
        try:
            found.append(_settings(source, number, stage, found))
        except UserError as error:
            raise ExperimentErrors([error], source.origins, source.file) from error
    return found


def _settings(source: Source, number: int, stage: Stage, before: list[StageSettings]) -> StageSettings:
    whole, key = source.experiment, f"stages.{number}.{stage.kind}"
    label = f"{number + 1}-{stage.kind}"
    folder = Path(whole.folder) / label
    own = _unfolded(stage.settings)
    _check_own(own, key, number, stage.kind, before)
    values = whole.model_dump(mode="json", exclude_unset=True, exclude={"stages"})
    if stage.kind == "export":
        values = _of_finished(values, before[-1])
    if whole.teacher is not None and whole.teacher.from_student:
        values["teacher"] = {**whole.teacher.model_dump(mode="json"), "from_student": False}
    asks_control = "control" in values.get("report", {})
    if before and stage.kind != "export":
        _from_before(values, before[-1])
    values = _merged(values, own)
    values["name"], values.setdefault("run", {})["folder"] = f"{whole.name}-{label}", str(folder)
    if stage.kind != "export" and not _trains(own) and _at_once(stage.kind, values):
        _check_untrained(own, key)
        values["training"] = {name: value for name, value in values["training"].items()
                              if name not in OF_TRAINING} | {"steps": 0}
    if not asks_control and "control" not in own.get("report", {}):
        values.setdefault("report", {})["control"] = False
    if stage.kind != "export" and (later := [one.kind for one in whole.stages[number + 1:]]):
        _hands_on(values, own, exact=set(later) != {"export"})
    above = replace(source, origins=before[-1].source.origins) if stage.kind == "export" else source
    origins = origins_of(above, number, stage.kind) | origins_of(replace(source, origins={
        key: place for key, place in source.origins.items() if key[0] == "stages"}), number, stage.kind)
    made = Source(_validated(values, source, key), source.file, origins)
    _check_kind(made, number, stage, before)
    return StageSettings(number, stage.kind, made, folder, stage.until)


def origins_of(source: Source, number: int, kind: str) -> dict[Key, str]:
    """Where each value of a stage was set: in the stage, else in the file."""
    found = dict(source.origins)
    for written in (kind, "distil" if kind == "distill" else kind):
        above = ("stages", str(number), written)
        for key, place in source.origins.items():
            if key[:3] == above and len(key) > 3:
                found[tuple(part for name in key[3:] for part in name.split("."))] = place
    return found


def _validated(values: dict[str, Any], source: Source, key: str) -> Any:
    number, kind = key.split(".")[1:]
    try:
        return type(source.experiment).model_validate(values)
    except ValidationError as error:
        found = mistakes(error)
        for one in found:
            one.problem += f" (in {key})"
        raise ExperimentErrors(found, origins_of(source, int(number), kind), source.file) from error


def _unfolded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys taken apart: `{training.steps: 5}` says `{training: {steps: 5}}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *above, last = key.split(".")
        node = found
        for depth, part in enumerate(above, 1):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(".".join(above[:depth]), f"it has a value, and {key} is a key within it", value=node,
                                way_out="leave one of them out")
        node[last] = _merged(node.get(last) or {}, _unfolded(value)) if isinstance(value, dict) else value
    return found


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested data with changes written into it; `student.prune` and its like are replaced as a whole where given."""
    found = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else copy.deepcopy(value)
    return found


def _check_own(own: dict[str, Any], key: str, number: int, kind: str, before: list[StageSettings]) -> None:
    """Raise `UserError` for settings that are not a stage's to say."""
    given = {*flatten(own), *own}
    for name, why in TAKEN.items():
        if any(one == name or one.startswith(f"{name}.") for one in given):
            raise UserError(f"{key}.{name}", why, way_out="set it outside of `stages`")
    if before and (origin := next((one for one in ORIGINS if (own.get("student") or {}).get(one) is not None), None)):
        raise UserError(f"{key}.student.{origin}", "a stage starts from the student of the stage before",
                        value=own["student"][origin], way_out="remove it; or make it the first stage")
    if kind == "export" and not before:
        raise UserError(key, "there is no student yet", way_out="begin with prune, distill or quantize; to export a "
                        "model as it is, use training.steps: 0 without stages")
    if kind == "export" and (other := next((one for one in own if one not in AFTER), None)):
        raise UserError(f"{key}.{other}", "an export does not change the student", value=own[other],
                        way_out=f"its keys are {', '.join(AFTER)}; put it into a stage before")


def _from_before(values: dict[str, Any], before: StageSettings) -> None:
    """Let a student start from that of the stage before, with its zeros if it has any."""
    student = {name: value for name, value in values["student"].items() if name == "trust_remote_code"}
    if before.source.experiment.form.trust:
        student["trust_remote_code"] = True
    if before.source.experiment.student.is_sparse:
        student["sparsity"] = {"method": "keep"}
    values["student"] = {**student, "path": str(before.student)}
    tokenizer = values.get("data", {}).get("tokenizer")
    if tokenizer is not None and not tokenizer.get("path"):
        values["data"] = {**values["data"], "tokenizer": {}}


def _of_finished(values: dict[str, Any], before: StageSettings) -> dict[str, Any]:
    """The values of the stage before, with what the file says of finished students."""
    made = before.source.experiment.model_dump(mode="json", exclude={"stages"})
    given = {name: values[name] for name in AFTER if name in values}
    return {**made, **{name: _merged(made[name], node) for name, node in given.items()}}


def _trains(own: dict[str, Any]) -> bool:
    training = own.get("training") or {}
    return training.get("steps") is not None or training.get("epochs") is not None


def _check_untrained(own: dict[str, Any], key: str) -> None:
    """Raise `UserError` for settings of a training in a stage that has none."""
    asked = {**{name: own.get(name) for name in ("optimizer", "schedule")},
             **{f"training.{name}": (own.get("training") or {}).get(name) for name in OF_TRAINING}}
    for name, value in asked.items():
        if value is not None:
            raise UserError(f"{key}.{name}", "the stage trains nothing, since it does not say for how long",
                            value=value, way_out="give it training.steps as well, or leave this out")


def _at_once(kind: str, values: dict[str, Any]) -> bool:
    """Whether a stage trains only if it says so: cuts, and rounding after training."""
    quantization = values["student"].get("quantization") or {}
    return kind == "prune" or (kind == "quantize" and quantization.get("method", "qat") != "qat")


def _hands_on(values: dict[str, Any], own: dict[str, Any], exact: bool) -> None:
    """Settings of a stage that is not the last: its student is for transformers alone.

    Args:
        exact: whether it is in full precision, since a later stage changes it further.
    """
    asked = own.get("export") or {}
    values["export"] = {**values.get("export", {}), "to": asked.get("to", [])}
    if exact:
        values["export"]["dtype"] = asked.get("dtype", "float32")
    if "readers" in values["export"] and "readers" not in asked:
        values["export"].pop("readers")


def _check_kind(made: Source, number: int, stage: Stage, before: list[StageSettings]) -> None:
    """Raise `UserError` for a stage that does not do what its name says, or cannot start from the one before."""
    experiment, key = made.experiment, f"stages.{number}.{stage.kind}"
    student = experiment.student
    does = {"prune": student.is_cut or (student.is_sparse and student.sparsity.method != "keep"),
            "quantize": student.quantization is not None}
    if not does.get(stage.kind, True):
        raise UserError(key, f"nothing says how: the stage has no {WORDS[stage.kind]}",
                        way_out="for example student: {prune: {mlp: 0.5}}" if stage.kind == "prune" else
                        "for example student: {quantization: {bits: 4, group_size: 32}}")
    if stage.kind == "prune" and stage.until is not None and student.prune is None:
        raise UserError(f"stages.{number}.until", "after the first round the student has as many zeros as "
                        "student.sparsity asks for, and no round makes more", way_out="leave it out, with a stage for "
                        "each share of zeros, or repeat student.prune")
    if stage.kind == "distill" and experiment.teacher is None:
        raise UserError(key, "there is no teacher to learn from", way_out="add `teacher` to the experiment; to train "
                        "without one, cut or quantize with training.steps in that stage")
    if stage.kind == "distill" and experiment.training.steps == 0:
        raise UserError(f"{key}.training.steps", "nothing would be learned", value=0, way_out="give it steps")
    if not before:
        return
    input_ = before[-1].source.experiment
    if stage.kind == "export" and experiment.export.dtype != input_.export.dtype and (
            (student.quantization is not None and student.quantization.trained)
            or (student.adapter is not None and student.adapter.base == "quantized")):
        raise UserError(f"{key}.export.dtype", f"the student of stage {before[-1].label} is trained with the numbers "
                        "of its file", value=experiment.export.dtype, way_out="set it in that stage, or outside of "
                        "`stages`")
    if stage.kind != "export" and input_.student.quantization is not None and student.quantization is None:
        raise UserError(key, f"it would start from the quantized student of stage {before[-1].label} and hand on one "
                        "in full precision", way_out="put this stage before that one, or give it student.quantization")
    if input_.export.adapter == "separate":
        raise UserError(f"stages.{number - 1}.{before[-1].kind}.export.adapter", "the next stage starts from a whole "
                        "model", value="separate", way_out="use merged")

"""Experiment nodes for a student that is made in several stages, each with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, Positive
from trainer.experiment.nodes import HELD_OUT, Best

KINDS = ("prune", "distill", "quantize", "export")
REPEATED = ("prune", "distill")  # kinds that do more each time
SHORT = "for example `- distill: {training: {steps: 500}}`"


class Until(Node):
    """How often a stage is repeated: each round starts from the student of the round before."""

    metric: Best | None = None
    """Held-out figure of the exported student that may get worse; null: accuracy, or bits_per_byte."""
    drop: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """How much worse it may be than the teacher's; without a teacher, than that of the student before."""
    rounds: Positive = 10
    """Rounds at most."""

    @model_validator(mode="after")
    def _held_out(self) -> Until:
        if self.metric is not None and self.metric not in HELD_OUT:
            raise UserError("metric", "rounds are judged by figures of held-out data", value=self.metric,
                            way_out=f"use one of {', '.join(HELD_OUT)}")
        return self


class Stage(Node):
    """One stage: its kind, with the settings of an experiment that are other than those of the file."""

    prune: dict[str, Any] | None = None
    """Cut the student (student.prune, student.sparsity); it is trained if the stage has training.steps or epochs."""
    distill: dict[str, Any] | None = None
    """Train the student with the teacher; in a file also written distil."""
    quantize: dict[str, Any] | None = None
    """Quantize the student (student.quantization), in training (qat) or after it (rtn, gptq)."""
    export: dict[str, Any] | None = None
    """Write the student of the stage before for other runtimes (export.to), and judge it on tasks."""
    until: Until | None = None
    """Repeat a stage of pruning or distillation until the student is too much worse; null: once."""

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {given: {}}
        if not isinstance(given, dict):
            return given
        if "distil" in given and "distill" in given:  # such as one in a file, and the other in an override
            raise UserError("", "distil and distill are the same kind, and only one of them can count",
                            way_out="write distill, or name the stage as the file does, stages.1.distil for example")
        given = {"distill" if key == "distil" else key: value for key, value in given.items()}
        named = [key for key in given if key in KINDS]
        return {**given, named[0]: {}} if len(named) == 1 and given[named[0]] is None else given

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        named = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            raise UserError("", "a stage is of one kind" + (f", and this has {', '.join(named)}" if named else ""),
                            way_out=f"write one of {', '.join(KINDS)} with its settings, {SHORT}")
        if self.until is not None and named[0] not in REPEATED:
            raise UserError("until", f"{named[0]} does the same each time", way_out=f"repeat {' or '.join(REPEATED)}, "
                            "or leave it out")
        return self

    @property
    def kind(self) -> str:
        """prune, distill, quantize or export."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the file, as nested plain data."""
        found: dict[str, Any] = getattr(self, self.kind)
        return found

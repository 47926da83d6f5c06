"""The trained weights of another run, from which a student starts (`student.from_run`)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from trainer.checkpoints.finding import listed
from trainer.checkpoints.manifest import Unreadable, wrong_with
from trainer.checkpoints.reading import load_whole
from trainer.errors import UserError
from trainer.experiment.model_nodes import Student
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.quantization_nodes import Quantization
from trainer.experiment.run_paths import KEY, check_run, run_of
from trainer.files import flatten


class WarmStart:
    """Loads the weights of a checkpoint of another run into a student, whatever engine wrote it.

    Attributes:
        checkpoint: the checkpoint named by `student.from_run`, or the newest intact one of the run.

    Raises:
        UserError: there is no such run, or no intact checkpoint in it.
    """

    def __init__(self, student: Student) -> None:
        assert student.from_run is not None
        check_run(student.from_run)
        self.student, self.run = student, run_of(student.from_run)
        self.checkpoint = self._intact()

    def load(self, model: nn.Module) -> None:
        """Load the weights of a model in full precision; what only training used is left out.

        Raises:
            UserError: the checkpoint lacks a weight, or has it in another shape.
        """
        try:
            load_whole(self.checkpoint, model)
        except Unreadable as error:
            raise self._error(f"its weights do not fit the student that {self.run} describes: {error}") from error

    def load_scales(self, model: nn.Module) -> None:
        """Load the learned scales too, where the run quantized as this one does; otherwise they begin anew."""
        then = (read_values(self.run / "experiment.yaml")[0].get("student") or {}).get("quantization")
        now = self.student.quantization
        if then is not None and now is not None and _same(then, now):
            try:
                load_whole(self.checkpoint, model)
            except Unreadable as error:
                raise self._error(f"its quantized weights do not fit: {error}") from error

    def _intact(self) -> Path:
        given = Path(str(self.student.from_run))
        found = [given] if given.absolute() != self.run.absolute() else [*reversed(listed(self.run / "checkpoints"))]
        passed = []
        for checkpoint in found:
            if (wrong := wrong_with(checkpoint)) is None:
                return checkpoint
            passed.append(f"{checkpoint.name}: {wrong}")
        raise self._error(f"no checkpoint there is as it was written ({'; '.join(passed[:3])})")

    def _error(self, problem: str) -> UserError:
        return UserError(KEY, problem, value=self.student.from_run,
                         way_out="name another checkpoint of it, or the exported student in `student.path`")


def _same(then: dict, now: Quantization) -> bool:
    ours = flatten(now.model_dump(mode="json"))
    theirs = flatten(then)
    return all(theirs.get(key, value) == value for key, value in ours.items())

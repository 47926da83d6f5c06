"""The record of a sweep, `sweep.json`: its runs, how each is doing, and what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, computed_field

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.run.folder import RunFolder, not_written, read_json
from trainer.run.run_status import in_use
from trainer.sweep.settings import run_folder
from trainer.sweep.sweep_file import MetricName, Seed
from trainer.sweep.sweep_metrics import figures

State = Literal["waiting", "running", "stopped", "failed", "finished"]
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class RunRecord(BaseModel):
    """How one run is doing; a run's own folder has the last word on whether it is finished."""

    label: SafeName
    values: dict[str, Any]
    seed: Seed
    state: State = "waiting"
    said: str = ""
    figures: dict[str, float] = {}

    @property
    def title(self) -> str:
        """Its setting and its seed."""
        return f"{self.label} seed {self.seed}"

    @property
    def log(self) -> str:
        """Its log file, from the folder of the sweep."""
        return f"logs/{self.label}.seed-{self.seed}.log"


class SweepRecord(BaseModel):
    """What `sweep.json` holds; `total` counts runs that are yet to be proposed by a search, too."""

    name: SafeName
    experiment: str
    metric: MetricName
    keys: dict[str, str]
    searched: bool
    total: int
    runs: list[RunRecord]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def finished(self) -> bool:
        """Whether all runs have finished; what is not there yet is never taken for a result."""
        return self.count("finished") == self.total

    def count(self, state: State) -> int:
        """Number of runs in a state."""
        return sum(run.state == state for run in self.runs)

    @property
    def progress(self) -> str:
        """How far the sweep is, in words."""
        if self.finished:
            return f"all {self.total} runs finished"
        words = {"failed": "failed", "stopped": "stopped", "running": "running"}
        rest = [f"{self.count(state)} {said}" for state, said in words.items() if self.count(state)]
        return ", ".join([f"{self.count('finished')} of {self.total} runs finished", *rest])


class SweepFolder:
    """Paths in the folder of a sweep, and its record."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record = self.path / "sweep.json"
        self.table = self.path / "sweep.md"
        self.picture = self.path / "sweep.png"

    def run(self, run: RunRecord) -> RunFolder:
        """The folder of a run."""
        return RunFolder(run_folder(self.path, run.label, run.seed))

    def check(self) -> None:
        """Raise `UserError` if this cannot be the folder of a sweep, or another sweep is using it."""
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise UserError("folder", f"{place} is a file", value=str(self.path), way_out="name a folder")
        if not self.path.exists() or all(entry.name.startswith(".") for entry in self.path.iterdir()):
            return
        if not self.record.exists():
            raise UserError("folder", "the folder exists and is not the folder of a sweep", value=str(self.path),
                            way_out="choose another `folder` or `name`, or move this folder away")
        if in_use(self.path):
            raise self._busy()

    def lock(self) -> None:
        """Lock the folder against other sweeps until this process ends, however it ends.

        Raises:
            UserError: another sweep holds the lock.
        """
        try:
            RunFolder(self.path).lock(wait=False)
        except UserError as error:
            raise self._busy() from error

    def _busy(self) -> UserError:
        return UserError("folder", "another sweep is using this folder now", value=str(self.path),
                         way_out="wait for it to end, or choose another `folder` or `name`")

    def write(self, record: SweepRecord, settings: Sequence[dict[str, Any]] = ()) -> None:
        """Replace the record; `settings` are summaries that are written for other readers, and never read back."""
        values = {**record.model_dump(mode="json"), "settings": list(settings)}
        write_atomically(self.record, json.dumps(values, indent=2) + "\n")

    def read(self) -> SweepRecord:
        """The record, with every run as its folder shows it now.

        Raises:
            UserError: the record, or a file of a finished run, is not as it was written.
        """
        try:
            record = SweepRecord.model_validate(read_json(self.record))
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise not_written(self.record, f"{place}: {error.errors()[0]['msg']}") from error
        for run in record.runs:
            self.look(run, record.metric)
        return record

    def look(self, run: RunRecord, metric: str) -> None:
        """Bring the record of a run up to what its folder shows."""
        folder = self.run(run)
        if run.state == "finished" and not folder.finished:
            run.state, run.figures = "waiting", {}
        elif run.state == "running" and not in_use(folder.path):
            run.state = "stopped"
        if run.state == "finished":
            run.figures = figures(folder, metric)

"""What stages have made so far: `stages.json` in the folder of an experiment, and what one hands to the next."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import OtherRun, UserError
from trainer.experiment.plain_yaml import read_values
from trainer.files import write_atomically
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES, main_figure
from trainer.run.metrics import read_lines

INPUT = ".input.json"  # hidden, since a stage is claimed after it
RECORD = "stages.json"


@dataclass(frozen=True)
class HandedOn:
    """A finished student, as a stage hands it to the next.

    Attributes:
        path: its folder.
        sha256: digest of its weight files.
        bytes_on_disk: of these files.
        parameters: their number.
        figures: what it was measured by on held-out data.
    """

    path: str
    sha256: str
    bytes_on_disk: int
    parameters: int
    figures: dict[str, float]

    @classmethod
    def of(cls, folder: RunFolder) -> HandedOn:
        """The student of a finished run.

        Raises:
            UserError: a file of it is not as a run writes it.
        """
        receipt, found = read_json(folder.receipt), read_json(folder.comparison)["student"]
        return cls(str(folder.student), receipt["sha256"], receipt["bytes_on_disk"], found["parameters"],
                   {name: found[name] for name in FIGURES if name in found})


@dataclass
class Made:
    """What a stage, or a round of one, has made.

    Attributes:
        label: its name.
        folder: its run folder.
        student: its student.
        steps, seconds: optimizer steps, and the seconds they took.
        cut: what was measured of the student after it was cut and before it was trained; None if nothing was cut.
        runtimes: bytes of the student for other runtimes, by name.
        kept: False for a round whose student is not handed on.
    """

    label: str
    folder: str
    student: HandedOn
    steps: int
    seconds: float
    cut: dict[str, Any] | None = None
    runtimes: dict[str, int] = field(default_factory=dict)
    kept: bool = True


def made(label: str, folder: RunFolder, kept: bool = True) -> Made:
    """What a finished run has made."""
    lines = [line for line in read_lines(folder.metrics) if "loss" in line] if folder.metrics.exists() else []
    cut = None
    if (record := folder.cut / "prune.json").is_file():
        values = read_json(record)
        cut = {"parameters": values["parameters"], "bytes_on_disk": values["bytes_on_disk"], **{
            name: values["held_out"][name] for name in FIGURES if name in values["held_out"]}}
    runtimes = {one.parent.name.removeprefix("student-"): int(read_json(one)["bytes_on_disk"])
                for one in sorted(folder.path.glob("student-*/receipt.json"))}
    return Made(label, str(folder.path), HandedOn.of(folder), len(lines), sum(line["seconds"] for line in lines), cut,
                runtimes, kept)


def check_input(folder: RunFolder, given: HandedOn | None, key: str) -> None:
    """Raise `OtherRun` if a stage was begun with another student than the stage before has now."""
    if given is None or not (folder.path / INPUT).exists():
        return
    if read_json(folder.path / INPUT).get("sha256") != given.sha256:
        raise OtherRun(key, f"{folder.path} was begun with another student than {given.path} is now",
                       way_out=f"move {folder.path} and the stages after it away, and start the same command again")


def keep_input(folder: RunFolder, given: HandedOn) -> None:
    """Record which student a stage starts from."""
    if not (folder.path / INPUT).exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.path / INPUT, json.dumps(asdict(given), indent=2) + "\n")


def teacher_of(folder: RunFolder) -> dict[str, Any] | None:
    """What was measured of the teacher beside the student of a finished run; None without one."""
    found: dict[str, Any] | None = read_json(folder.comparison).get("teacher")
    return found


def metric_of(figures: dict[str, float], asked: str | None) -> str:
    """The figure that students are compared by.

    Raises:
        UserError: they are not measured by it.
    """
    name = asked or main_figure(figures)
    if name not in figures:
        raise UserError("until.metric", f"the students are measured by {', '.join(figures)}", value=asked,
                        way_out="use one of them, or leave it out")
    return name


def worse_by(metric: str, value: float, than: float) -> float:
    """How much worse a figure is than another; negative if it is better."""
    return than - value if FIGURES[metric].higher else value - than


class StagesFolder:
    """The folder of an experiment in stages, and its record.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record = self.path / RECORD
        self.experiment = self.path / "experiment.yaml"
        self.report = self.path / "report.md"
        self.picture = self.path / "stages.png"
        self.student = self.path / "student"

    def check(self) -> None:
        """Raise `OtherRun` if the folder is of something else."""
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise UserError("run.folder", f"{place} is a file", value=str(self.path), way_out="name a folder")
        if not self.path.exists() or all(entry.name.startswith(".") for entry in self.path.iterdir()):
            return
        if not self.record.exists():
            raise OtherRun("run.folder", "the folder exists and is not of an experiment in stages",
                           value=str(self.path), way_out="choose another `run.folder` or `name`, or move it away")

    @property
    def planned(self) -> int:
        """How many stages its experiment has."""
        return len(read_values(self.experiment)[0].get("stages") or ()) if self.experiment.exists() else 0

    @property
    def finished(self) -> bool:
        """Whether all stages are made, and reported on."""
        return self.report.exists() and self.record.exists() and 0 < self.planned <= len(self.read()["stages"])

    def write(self, values: dict[str, Any]) -> None:
        """Replace the record."""
        write_atomically(self.record, json.dumps(values, indent=2) + "\n")

    def read(self) -> dict[str, Any]:
        """The record."""
        found: dict[str, Any] = read_json(self.record)
        return found


def last_run(path: str | Path) -> Path:
    """The run folder of the last stage that is finished, if a path is a folder of stages; else the path itself.

    Raises:
        UserError: no stage is finished yet.
    """
    folder = StagesFolder(path)
    if not folder.record.exists():
        return Path(path)
    done = [one for stage in folder.read()["stages"] for one in stage["made"] if one["kept"]]
    if not done:
        raise UserError("", f"no stage of {path} is finished yet", way_out="start its command again")
    return Path(done[-1]["folder"])

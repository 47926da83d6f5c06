"""The run folder: `experiment.yaml`, `plan.json`, `metrics.jsonl`, `checkpoints/`, `student/`, `report.md`."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import resolved_yaml
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.renamed import with_new_names
from trainer.files import flatten, read_object, write_atomically

# Keys that a resumed run may change: where it is kept, how it logs, how often it evaluates and saves. None of them
# changes what is learned. Another micro-batch splits the same sum differently; with dropout it draws other masks, which
# are as good. Another engine computes the same; in half precision it rounds at other points.
FREE = ("run", "report", "memory", "sharding", "training.evaluate_every", "training.checkpoint_every",
        "training.keep_checkpoints", "training.background_saves", "training.micro_batch", "data.workers",
        "export.tolerance", "export.to")

# Keys that affect only the exported files and the report, if training does not use quantized weights.
AFTERWARDS = ("student.quantization", "export", "report")

LARGEST_JSON = 256 * 2**20  # bytes of a file that is read back; the largest runs write about a hundredth of this
_LOCKS: dict[Path, Any] = {}  # file locks held by this process; the system releases them when it ends


class RunFolder:
    """Paths in a run folder, and the experiment that it belongs to."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.experiment = self.path / "experiment.yaml"
        self.plan = self.path / "plan.json"
        self.measured = self.path / "measured.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.digests = self.path / "digests.json"
        self.student = self.path / "student"
        self.unverified = self.path / ".student.unverified"
        self.receipt = self.student / "receipt.json"
        self.allocation = self.path / "allocation.json"
        self.comparison = self.path / "comparison.json"
        self.control = self.path / "control"
        self.report = self.path / "report.md"

    def student_for(self, runtime: str) -> Path:
        """Folder of the student exported for another runtime, with its own receipt."""
        return self.path / f"student-{runtime}"

    @property
    def finished(self) -> bool:
        """Whether the run is complete: the student is exported and the report is written."""
        return self.report.exists() and self.receipt.exists()

    def check(self, experiment: Experiment) -> None:
        """Raise `UserError` if the folder belongs to another experiment or is not a run folder."""
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise UserError("run.folder", f"{place} is a file", value=str(self.path), way_out="name a folder")
        if not self.path.exists() or all(entry.name.startswith(".") for entry in self.path.iterdir()):
            return
        way_out = "choose another `run.folder` or `name`, or move this folder away"
        if not self.experiment.exists():
            raise UserError("run.folder", "the folder exists and is not a run folder", value=str(self.path),
                            way_out=way_out)
        asked = experiment.model_dump(mode="json")
        later = self.afterwards(asked)
        changed = [(key, *values) for key, values in self.changed(asked).items()
                   if not _free(key) and key not in later]
        if changed:
            shown = "; ".join(f"{key} was {was!r} and is {now!r}" for key, was, now in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError("run.folder", f"the folder belongs to another experiment: {shown}{more}",
                            value=str(self.path), way_out=way_out)

    def changed(self, asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ from the experiment recorded in the folder, with their values then and now.

        Args:
            asked: the values of the present experiment, as plain data.
        """
        then = flatten(self._values())
        now = flatten(asked)
        return {key: (then.get(key), now.get(key)) for key in sorted({*then, *now}) if then.get(key) != now.get(key)
                and not (key.endswith(".revision") and now.get(key) is None)}  # a run pins revisions when it begins

    def afterwards(self, asked: dict[str, Any]) -> list[str]:
        """Changed keys that act only after training, so that their results can be made again from a checkpoint.

        Quantization settings are not among them if the student is trained with quantization (qat), before or after the
        change, since they are part of its training then.
        """
        methods = {(one["student"].get("quantization") or {}).get("method") for one in (self._values(), asked)}
        places = AFTERWARDS if "qat" not in methods else ("report", "export.to", "export.tolerance")
        return [key for key in self.changed(asked) if _under(key, places)]

    def _values(self) -> dict[str, Any]:
        """The values of the experiment recorded in the folder, under the names of this version."""
        return with_new_names(read_values(self.experiment)[0])

    def adopt(self, experiment: Experiment) -> None:
        """Record the changed values with which the exported files and the report have been made again."""
        values, asked = self._values(), experiment.model_dump(mode="json")
        for key in self.afterwards(asked):
            name = next(one for one in AFTERWARDS if _under(key, (one,)))
            *above, last = name.split(".")
            inner, new = values, asked
            for part in above:
                inner, new = inner[part], new[part]
            inner[last] = new[last]
        write_atomically(self.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                         f"{resolved_yaml(Experiment.model_validate(values))}")

    def claim(self, experiment: Experiment, plan: dict[str, Any]) -> None:
        """Create the folder and write the resolved experiment and the plan; call on the main process only.

        Raises:
            UserError: another run is using the folder.
        """
        self.lock(wait=False)
        if not self.experiment.exists():
            write_atomically(self.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                             f"{resolved_yaml(experiment)}")
        write_atomically(self.plan, json.dumps(plan, indent=2) + "\n")

    def lock(self, wait: bool) -> None:
        """Lock the folder against other runs until this process ends, however it ends.

        Args:
            wait: whether to wait for another run to release it.

        Raises:
            UserError: another run holds the lock, and `wait` is false.
        """
        if self.path in _LOCKS:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = (self.path / ".lock").open("a")  # "a", since it may be a symlink, whose target must keep its content
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            handle.close()
            raise UserError("run.folder", "another run is using this folder now", value=str(self.path),
                            way_out="wait for it to end, or choose another `run.folder` or `name`") from error
        _LOCKS[self.path] = handle


def _let_go() -> None:
    """Release inherited locks in a forked child: a data worker must not keep folders locked after its parent died."""
    while _LOCKS:
        _LOCKS.popitem()[1].close()


os.register_at_fork(after_in_child=_let_go)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file written by a run, which may have been edited since.

    Raises:
        UserError: the file is no longer a JSON object.
    """
    try:
        return read_object(file, LARGEST_JSON)
    except ValueError as error:
        raise not_written(file, str(error)) from error


def not_written(file: Path, why: str) -> UserError:
    """The error for a file of a run folder that is not in the format in which a run writes it."""
    return UserError("", f"{file} is not as a run writes it: {why}",
                     way_out="put it back from a copy, or run the experiment again in another run.folder")


def training_identity(experiment: Experiment) -> dict[str, Any]:
    """The values of an experiment that determine the trained weights, by dotted key."""
    values = flatten(experiment.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key != "name" and not _free(key)}


def _free(key: str) -> bool:
    return _under(key, FREE)


def _under(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)

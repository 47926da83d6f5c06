"""The run folder: its files, the experiment that it belongs to, and whether that may go on with other values."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.errors import OtherRun, UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import resolved_yaml
from trainer.experiment.load import node_of
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.renamed import with_new_names
from trainer.experiment.run_paths import CHECKPOINTS, MODEL, STUDENT
from trainer.experiment.task_nodes import OWN
from trainer.files import flatten, read_value, write_atomically
from trainer.run.changes import AFTERWARDS, IN_ANY_CASE, Changes, is_free, longer, over_the_run, refused, under

# Keys that came later, and count for the identity of a training only where they are set: what earlier versions cached
# under the others is still found.
LATER = ("training.keep_best", "training.early_stopping", "training.min_delta", "student.from_run", "student.adapter",
         "student.prune", "student.sparsity", "objective.early_exits", "data.sources", "data.system",
         "data.input_ids", "data.labels", "schedule.restarts", "export.adapter", "export.readers",
         "objective.divergence.normalized", "stages")

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
        self.model = self.path / MODEL
        self.checkpoints = self.path / CHECKPOINTS
        self.cut = self.path / "cut"
        self.best = self.path / "best.json"
        self.digests = self.path / "digests.json"
        self.student = self.path / STUDENT
        self.unverified = self.path / ".student.unverified"
        self.receipt = self.student / "receipt.json"
        self.allocation = self.path / "allocation.json"
        self.comparison = self.path / "comparison.json"
        self.evaluation = self.path / "evaluation.json"
        self.control = self.path / "control"
        self.report = self.path / "report.md"
        self.history = self.path / "history.json"
        self.earlier = self.path / "earlier"

    def student_for(self, runtime: str) -> Path:
        """Folder of the student exported for another runtime, with its own receipt."""
        return self.path / f"student-{runtime}"

    @property
    def finished(self) -> bool:
        """Whether the run is complete: the student is exported and the report is written."""
        return self.report.exists() and self.receipt.exists()

    @property
    def locked(self) -> bool:
        """Whether this process holds the folder's lock."""
        return self.path in _LOCKS

    def holds(self, asked: dict[str, Any]) -> bool:
        """Whether the folder has all that an experiment asks for, so that running it again would do nothing.

        Args:
            asked: the values of the experiment, as plain data.
        """
        return self.finished and not self.afterwards(asked) and all(map(is_free, self.changed(asked)))

    def check(self, experiment: Experiment) -> None:
        """Raise `UserError` if the folder is not a run folder, and `OtherRun` if it belongs to another experiment.

        Values that act only after training may differ, and so may those by which a run goes on for longer.
        """
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise UserError("run.folder", f"{place} is a file", value=str(self.path), way_out="name a folder")
        if not self.path.exists() or all(
                entry.name.startswith(".") or entry == self.cut for entry in self.path.iterdir()):
            return  # a cut is made before the folder is claimed
        if not self.experiment.exists():
            raise OtherRun("run.folder", "the folder exists and is not a run folder", value=str(self.path),
                           way_out="choose another `run.folder` or `name`, or move this folder away")
        asked = experiment.model_dump(mode="json")
        allowed, changes = {*self.afterwards(asked), *self.longer(asked)}, self.changed(asked)
        if wrong := [key for key in changes if not is_free(key) and key not in allowed]:
            raise refused(self.path, changes, wrong, self.reached, self._values())

    @property
    def reached(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")
                    if path.name.removeprefix("step-").isdecimal()), default=0)

    def changed(self, asked: dict[str, Any]) -> Changes:
        """Keys whose values differ from the experiment recorded in the folder, with their values then and now.

        Args:
            asked: the values of the present experiment, as plain data.
        """
        if not self.experiment.exists():
            return {}
        then, now, usual = flatten(self._values()), flatten(asked), flatten(_defaults_of(Experiment, asked))
        # A key that the version before did not have is as it is by default, and a run pins revisions when it begins.
        return {key: (then.get(key), now.get(key)) for key in sorted({*then, *now})
                if _unpinned(then.get(key, usual.get(key)), now.get(key)) != now.get(key)
                and not (key.endswith(".revision") and now.get(key) is None)}

    def longer(self, asked: dict[str, Any]) -> list[str]:
        """Changed keys by which the run goes on for longer; none if it cannot go on with those values."""
        return longer(self.changed(asked), self.reached, over_the_run(asked) is not None)

    def afterwards(self, asked: dict[str, Any]) -> list[str]:
        """Changed keys that act only after training, so that their results can be made again from a checkpoint.

        Quantization settings and the dtype of the export are not among them if the student is trained with quantization
        (qat), or on a base that is held as it is exported, before or after the change: they are part of its training
        then.
        """
        students = [one["student"] for one in (self._values(), asked)]
        trained = any((one.get("quantization") or {}).get("method") == "qat" for one in students)
        held = any((one.get("adapter") or {}).get("base") == "quantized" for one in students)
        places = IN_ANY_CASE if trained else (*IN_ANY_CASE, "export.adapter") if held else AFTERWARDS
        return [key for key in self.changed(asked) if under(key, places) and key != "evaluate.every"]

    def _values(self) -> dict[str, Any]:
        """The values of the experiment recorded in the folder, under the names of this version."""
        return with_new_names(read_values(self.experiment)[0])

    def adopt(self, experiment: Experiment) -> None:
        """Record changed values: the exported files and the report were made again with them, or the run goes on."""
        values, asked = self._values(), experiment.model_dump(mode="json")
        for key in [*self.afterwards(asked), *self.longer(asked)]:
            name = next((one for one in AFTERWARDS if under(key, (one,))), key)
            *above, last = name.split(".")
            inner, new = values, asked
            for part in above:
                inner, new = inner[part], new[part]
            inner[last] = new[last]
        write_atomically(self.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                         f"{resolved_yaml(Experiment.model_validate(values))}")

    def claim(self, experiment: Experiment, plan: dict[str, Any]) -> None:
        """Create the folder and write the resolved experiment and the plan; call on the main process only.

        If the run goes on for longer, what its earlier end made is kept in `earlier/`.

        Raises:
            OtherRun: another run is using the folder.
        """
        self.lock(wait=False)
        if not self.experiment.exists():
            write_atomically(self.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                             f"{resolved_yaml(experiment)}")
        elif keys := self.longer(asked := experiment.model_dump(mode="json")):
            changes = self.changed(asked)
            self._set_aside(self.earlier / f"step-{self.reached:08d}")
            write_atomically(self.history, json.dumps([*self.extensions(), {
                "step": self.reached, "changed": {key: changes[key] for key in keys}}], indent=2) + "\n")
            self.adopt(experiment)
        elif self.afterwards(asked):  # a run that goes on makes its student with the values of now
            self.adopt(experiment)
        write_atomically(self.plan, json.dumps(plan, indent=2) + "\n")

    def extensions(self) -> list[dict[str, Any]]:
        """Where the run has gone on for longer: the step, and values before and after; none if it never did."""
        if not self.history.exists():
            return []
        found = read_json(self.history, list)
        if all(isinstance(one, dict) and isinstance(one.get("step"), int) and isinstance(one.get("changed"), dict)
               for one in found):
            return found
        raise not_written(self.history, "an entry has no step or no changes")

    def _set_aside(self, folder: Path) -> None:
        """Move what the end of a run made; the report first, without which the run does not look finished.

        If the process is killed in between, the next one moves the rest.
        """
        made = [self.report, self.comparison, self.evaluation, *sorted(self.path.glob("*.png")), self.allocation,
                self.digests, self.best, self.measured, *sorted(self.path.glob("student-*")), self.student]
        for path in made:
            if path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / path.name)

    def lock(self, wait: bool) -> None:
        """Lock the folder against other runs until this process ends, however it ends.

        Args:
            wait: whether to wait for another run to release it.

        Raises:
            OtherRun: another run holds the lock, and `wait` is false.
        """
        if self.path in _LOCKS:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = (self.path / ".lock").open("a")  # "a", since it may be a symlink, whose target must keep its content
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            handle.close()
            raise self.busy() from error
        _LOCKS[self.path] = handle


    def busy(self) -> OtherRun:
        """The error that another run is using the folder."""
        return OtherRun("run.folder", "another run is using this folder now", value=str(self.path),
                        way_out="wait for it to end, or choose another `run.folder` or `name`")


def _let_go() -> None:
    """Release inherited locks in a forked child: a data worker must not keep folders locked after its parent died."""
    while _LOCKS:
        _LOCKS.popitem()[1].close()


os.register_at_fork(after_in_child=_let_go)


def _unpinned(then: Any, now: Any) -> Any:
    """A recorded list of models without the revisions that the run pinned when it began."""
    if not (isinstance(then, list) and isinstance(now, list) and len(then) == len(now)):
        return then
    return [{**old, "revision": None} if isinstance(old, dict) and isinstance(new, dict) and "revision" in old
            and new.get("revision") is None else old for old, new in zip(then, now, strict=True)]


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file written by a run, which may have been edited since.

    Args:
        kind: dict for an object, list for a list.

    Raises:
        UserError: the file is no longer JSON of that kind.
    """
    try:
        return read_value(file, LARGEST_JSON, kind)
    except ValueError as error:
        raise not_written(file, str(error)) from error


def _defaults_of(node: type[BaseModel], asked: dict[str, Any]) -> dict[str, Any]:
    """The default of each key of a node, and below the nodes that an experiment's values have, as plain data."""
    found = {}
    for name, info in node.model_fields.items():
        inner = node_of(info.annotation)
        if inner is not None and isinstance(asked.get(name), dict):
            found[name] = _defaults_of(inner, asked[name])
        elif not info.is_required():
            default = info.get_default(call_default_factory=True)
            found[name] = default.model_dump(mode="json") if isinstance(default, BaseModel) else (
                list(default) if isinstance(default, tuple) else default)
    return found


def not_written(file: Path, why: str) -> UserError:
    """The error for a file of a run folder that is not in the format in which a run writes it."""
    return UserError("", f"{file} is not as a run writes it: {why}",
                     way_out="put it back from a copy, or run the experiment again in another run.folder")


def training_identity(experiment: Experiment) -> dict[str, Any]:
    """The values of an experiment that determine the trained weights, by dotted key."""
    values = flatten(experiment.model_dump(mode="json"))
    unused = {"task", *OWN} if experiment.data.is_language else set()  # of data; came later, and say nothing here
    return {key: value for key, value in values.items() if key != "name" and not is_free(key)
            and not (key in LATER and value in (None, [], (), False)) and not _is_of_data(key, unused)}


def _is_of_data(key: str, names: set[str]) -> bool:
    """Whether a dotted key is one of some keys of `data`, or within one."""
    node, _, rest = key.partition(".")
    return node == "data" and rest.split(".")[0] in names

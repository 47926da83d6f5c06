"""The run folder: `experiment.yaml`, `plan.json`, `metrics.jsonl`, `checkpoints/`, `student/`, `report.md`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.experiment.explaining import resolved_yaml
from trainer.experiment.tree import Experiment

# What a continued run may change: where it is kept, what it tells, how often it looks. None of it changes the weights.
FREE = ("run", "report", "training.evaluate_every", "training.checkpoint_every", "training.keep_checkpoints",
        "data.workers", "export.tolerance")


class RunFolder:
    """The places in a run folder, and whose folder it is."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.experiment = self.path / "experiment.yaml"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.unverified = self.path / ".student.unverified"
        self.receipt = self.student / "receipt.json"
        self.comparison = self.path / "comparison.json"
        self.control = self.path / "control"
        self.report = self.path / "report.md"

    @property
    def finished(self) -> bool:
        """Whether the run is done: its student is exported and reported on."""
        return self.report.exists() and self.receipt.exists()

    def check(self, experiment: Experiment) -> None:
        """Raise `UserError` if the folder belongs to another experiment or is not a run folder."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        way_out = "choose another `run.folder` or `name`, or move this folder away"
        if not self.experiment.exists():
            raise UserError("run.folder", "the folder exists and is not a run folder", value=str(self.path),
                            way_out=way_out)
        theirs = flatten(yaml.safe_load(self.experiment.read_text()))
        ours = flatten(experiment.model_dump(mode="json"))
        changed = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key) and not _free(key)]
        if changed:
            shown = "; ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError("run.folder", f"the folder belongs to another experiment: {shown}{more}",
                            value=str(self.path), way_out=way_out)

    def claim(self, experiment: Experiment, plan: dict[str, Any]) -> None:
        """Make the folder, with the resolved experiment and the plan."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.plan, json.dumps(plan, indent=2) + "\n")
        write_atomically(self.experiment, f"# Resolved by Limbeck: every value, defaults included.\n"
                         f"{resolved_yaml(experiment)}")


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whenever the process dies."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, file)


def fingerprint(values: Any) -> str:
    """Short hash of plain data, for the names of cached things."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)

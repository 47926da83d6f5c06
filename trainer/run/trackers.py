"""Experiment trackers beside metrics.jsonl: one run of theirs for all starts of ours, given up if one cannot write."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.files import flatten, write_atomically
from trainer.run.folder import RunFolder
from trainer.run.metrics import console

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trackers:
    """The trackers of a training, which log until one of them cannot write.

    Args:
        name: the experiment, for the warning.
        active: whether there are any; a teacher or control that is trained along the way has none.
    """

    def __init__(self, accelerator: Accelerator, name: str, active: bool) -> None:
        self._accelerator, self._name, self._active = accelerator, name, active

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values of a step."""
        if not self._active:
            return
        try:
            self._accelerator.log(values, step)
        except OSError as error:  # such as a full disk, which is no reason to end the run
            self._active = False
            console.print(f"{self._name}  warning: trackers are told no more, since one cannot write: "
                          f"{error.strerror or error}; metrics.jsonl has everything")


def start_trackers(accelerator: Accelerator, names: Sequence[str], values: Mapping[str, Any], folder: RunFolder,
                   step: int) -> None:
    """Start the experiment trackers; a resumed run continues its earlier tracker runs, from the step it resumes at.

    Args:
        names: the trackers.
        values: the experiment's, as plain data; `name` among them.

    Raises:
        UserError: one cannot start.
    """
    identity = _tracker_id(folder) if accelerator.is_main_process else ""
    known = {"wandb": {"id": identity, "resume": "allow"},
             "trackio": {"name": f"{values['name']}-{identity}", "resume": "allow"},
             "tensorboard": {"purge_step": step + 1}}  # drops the points of steps that are run again
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value)
             for key, value in flatten(dict(values)).items()}
    try:
        accelerator.init_trackers("limbeck", config=plain, init_kwargs=known)
    except Exception as error:  # each tracker raises its own errors, for example for a missing login
        raise UserError("run.trackers", f"a tracker could not start: {error}", value=list(names),
                        way_out="log in to it, or remove it; metrics.jsonl is always written") from error


def _tracker_id(folder: RunFolder) -> str:
    """The id of this run for trackers, created at its first start and kept in `tracker.id`."""
    file = folder.path / "tracker.id"
    known = file.read_text() if file.exists() else ""
    if not re.fullmatch("[0-9a-f]{16}", known):
        known = secrets.token_hex(8)
        write_atomically(file, known)
    return known

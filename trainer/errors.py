"""Exceptions that end a run early: a user's mistake (exit code 2), a failed run (1), a requested stop (75)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_UNSET = object()


class UserError(ValueError):
    """A mistake in the user's input: names the field, what is wrong with its value, and how to fix it.

    `key` is the dotted key in the experiment (`data.path`); the command line resolves it to `file:line`.
    """

    def __init__(self, key: str, problem: str, *, value: Any = _UNSET, way_out: str = ""):
        super().__init__(problem)
        self.key, self.problem, self.way_out = key, problem, way_out
        self.has_value = value is not _UNSET
        self.value = None if value is _UNSET else value


class OtherRun(UserError):
    """The run folder belongs to another experiment, or another run is using it now: nothing may be written to it."""


class ExperimentErrors(ValueError):
    """All mistakes found while reading an experiment, reported together.

    Attributes:
        errors: the mistakes.
        origins: where each key that could be read was set: `file:line` or override.
        place: place to report for mistakes whose key has no origin.
    """

    def __init__(self, errors: list[UserError], origins: dict[tuple[str, ...], str], place: str):
        super().__init__("; ".join(error.problem for error in errors))
        self.errors, self.origins, self.place = errors, origins, place


class RunFailed(RuntimeError):
    """The run cannot continue, for a reason that could not be foreseen; its checkpoints are intact."""


class Lost(RunFailed):
    """Another process is gone or stuck, so that an orderly shutdown of this one would wait for it forever."""


class Stopped(RuntimeError):
    """A signal asked the run to stop: all processes agreed on the step, and saved if a checkpoint could be written.

    Attributes:
        step: number of optimizer steps completed.
        signal: name of the signal.
        process: rank of the process that received it.
        saved: name of the newest checkpoint, or None.
    """

    def __init__(self, name: str, step: int, signal: str, process: int, saved: str | None):
        kept = "nothing was to be saved yet" if not step else "saved" if saved == f"step-{step:08d}" else \
            f"not saved, the newest checkpoint is {saved or 'none'}"
        super().__init__(f"{name}: stopped at step {step} by {signal} on process {process}: {kept}; "
                         "start the same command again to go on")
        self.step, self.signal, self.process, self.saved = step, signal, process, saved


@contextmanager
def error_context(key: str, *, value: Any = _UNSET, way_out: str = "") -> Iterator[None]:
    """Turn a `ValueError` from a strategy, which knows nothing of experiments, into a `UserError` for `key`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, str(error), value=value, way_out=way_out) from error

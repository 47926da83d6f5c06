"""How a run ends early: a person's mistake (exit code 2), a run that cannot go on (1), one asked to stop (75)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_UNSET = object()


class UserError(ValueError):
    """A mistake in what was asked for: says which field, what is wrong with its value, and the way out.

    `key` is the dotted key in the experiment (`data.path`); the command line turns it into `file:line`.
    """

    def __init__(self, key: str, problem: str, *, value: Any = _UNSET, way_out: str = ""):
        super().__init__(problem)
        self.key, self.problem, self.way_out = key, problem, way_out
        self.has_value = value is not _UNSET
        self.value = None if value is _UNSET else value


class ExperimentErrors(ValueError):
    """Mistakes found in reading an experiment, shown together.

    Attributes:
        errors: the mistakes.
        origins: where each key that could be read was written, `file:line` or override.
        place: where the mistakes are, for those whose key has no origin.
    """

    def __init__(self, errors: list[UserError], origins: dict[tuple[str, ...], str], place: str):
        super().__init__("; ".join(error.problem for error in errors))
        self.errors, self.origins, self.place = errors, origins, place


class RunFailed(RuntimeError):
    """The run cannot go on, through no mistake in the experiment that could be seen before; what it saved is good."""


class Lost(RunFailed):
    """Another process is gone or stuck. What tears a process down in good order would wait for it for ever."""


class Stopped(RuntimeError):
    """A signal asked the run to stop, all processes agreed on the step, and what was learned is saved.

    Attributes:
        step: optimizer steps done.
        signal: its name.
        process: number of the one that got it.
        saved: name of the newest checkpoint, if there is one.
    """

    def __init__(self, name: str, step: int, signal: str, process: int, saved: str | None):
        kept = "nothing was to be saved yet" if not step else "saved" if saved == f"step-{step:08d}" else \
            f"not saved, the newest checkpoint is {saved or 'none'}"
        super().__init__(f"{name}: stopped at step {step} by {signal} on process {process}: {kept}; "
                         "start the same command again to go on")
        self.step, self.signal, self.process, self.saved = step, signal, process, saved


@contextmanager
def error_context(key: str, *, value: Any = _UNSET, way_out: str = "") -> Iterator[None]:
    """Give the `ValueError` of a strategy, which knows no experiment, the key that led to it."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, str(error), value=value, way_out=way_out) from error

"""The two ways a run ends early: a person's mistake (exit code 2) and a run that cannot go on (exit code 1)."""

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


@contextmanager
def blame(key: str, *, value: Any = _UNSET, way_out: str = "") -> Iterator[None]:
    """Give the `ValueError` of a strategy, which knows no experiment, the key that led to it."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, str(error), value=value, way_out=way_out) from error

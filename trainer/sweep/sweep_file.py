"""The sweep file: which values of an experiment are tried, on which seeds, and what the results are ranked by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import mistakes
from trainer.experiment.node import Node, PathName, Positive
from trainer.experiment.plain_yaml import Key, read_values
from trainer.sweep.sweep_overrides import apply_overrides

WAYS = ("grid", "list", "search")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MetricName = Literal["bits_per_byte", "accuracy", "macro_f1", "calibration_error", "bytes_on_disk", "tokens_per_second",
                     "rows_per_second", "argmax_agreement", "held_out.bits_per_byte", "held_out.cross_entropy",
                     "held_out.accuracy", "held_out.macro_f1", "held_out.calibration_error", "memory_peak", "seconds"]


def _values_to_try(values: object) -> object:
    if not isinstance(values, list):
        raise UserError("", "a list of values to try is needed here", value=values, way_out="write them in brackets, "
                        f"as in [{values}]; what is the same for all runs goes under `overrides`")
    if not values:
        raise UserError("", "the list is empty, so there would be no run", value=values,
                        way_out="name values to try, or remove the key")
    return tuple(values)


def _range_or_values(value: object) -> object:
    return {"choices": value} if isinstance(value, list) else value


class Parameter(Node):
    """What a key may be in a search: `[a, b, c]`, or `{low: a, high: b}`."""

    choices: Annotated[tuple[Any, ...] | None, BeforeValidator(lambda values: values and _values_to_try(values))] = None
    """Values to choose from; a list in the place of the node says the same."""
    low: int | float | None = None
    """The least value; two whole numbers as `low` and `high` search whole numbers only."""
    high: int | float | None = None
    """The greatest value."""
    log: bool = False
    """Whether a factor counts the same everywhere in the range, as it does for learning rates."""

    @model_validator(mode="after")
    def _whole(self) -> Parameter:
        ends = (self.low, self.high)
        if self.choices is not None:
            if ends != (None, None):
                raise UserError("choices", "these are both values to choose from and a range",
                                way_out="keep `choices`, or `low` and `high`")
            return self
        if self.low is None or self.high is None:
            raise UserError("", "a range needs both `low` and `high`", way_out="write {low: 1e-5, high: 1e-2, log: "
                            "true}, or [a, b, c] for values to choose from")
        if not self.low < self.high:
            raise UserError("low", f"the range is empty: `high` is {self.high}", value=self.low,
                            way_out="let `low` be less than `high`")
        if self.log and self.low <= 0:
            raise UserError("low", "a logarithmic range begins above zero", value=self.low,
                            way_out="raise it, or set log: false")
        return self


class Search(Node):
    """A search by optuna, which proposes values from what earlier trials have found."""

    trials: Positive
    """Settings to try; each is run on every seed, and judged by the mean of the metric."""
    seed: Seed = 0
    """Random seed of the proposals; those of the runs are `seeds` of the sweep."""
    space: dict[str, Annotated[Parameter, BeforeValidator(_range_or_values)]]
    """Key of the experiment -> what it may be: `[4, 8]`, or `{low: 1e-5, high: 1e-2, log: true}`."""

    @model_validator(mode="after")
    def _whole(self) -> Search:
        if not self.space:
            raise UserError("space", "nothing is searched", value={},
                            way_out="name a key: {optimizer.lr: {low: 1e-5, high: 1e-2, log: true}}")
        return self


class Sweep(Node):
    """Many runs of one experiment; just one of `grid`, `list` and `search` names what differs between them."""

    experiment: PathName
    """The experiment that all runs are made from, a path from the working folder as any other."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the sweep; null: that of the sweep file."""
    folder: PathName | None = None
    """Where runs and results are kept; null: `runs/sweeps/<name>`."""
    overrides: dict[str, Any] = {}
    """Values that all runs have, by key of the experiment (`training.steps: 200`)."""
    grid: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_values_to_try)]] = {}
    """Key of the experiment -> values to try; every combination is run."""
    list: tuple[dict[str, Any], ...] = ()
    """Settings to run, each by its own overrides; `{}` is the experiment as it is."""
    search: Search | None = None
    """A search by optuna (`pip install 'limbeck[search]'`)."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds that each setting is run with; null: the experiment's own alone."""
    jobs: Positive = 1
    """Runs at a time on this machine. They share its cores; with GPUs each has one, in turn."""
    metric: MetricName | None = None
    """What settings are ranked by: figures of the exported student, of the last evaluation (`held_out.`), or of the
    training; null: `bits_per_byte`, or `accuracy` for a classification."""

    @model_validator(mode="after")
    def _whole(self) -> Sweep:
        if self.seeds == ():
            raise UserError("seeds", "the list is empty, so there would be no run", value=[],
                            way_out="name a seed, or leave it out for the experiment's own")
        for index, seed in enumerate(self.seeds or ()):
            if seed in self.seeds[:index]:
                raise UserError("seeds", f"the seed {seed} stands twice, and would make the same run twice",
                                value=[*self.seeds], way_out="name each seed once")
        given = [way for way in WAYS if getattr(self, way)]
        if len(given) > 1:
            raise UserError(given[1], f"settings are named by {given[0]} already", way_out=f"keep one of "
                            f"{' and '.join(given)}; a list may hold any combinations")
        if not given and len(self.seeds or ()) < 2:
            raise UserError("", "nothing differs between the runs of this sweep", way_out="add `grid`, `list` or "
                            "`search`, or several `seeds`: grid: {optimizer.lr: [1e-4, 3e-4]}")
        return self


@dataclass(frozen=True)
class SweepSource:
    """A sweep as it is written.

    Attributes:
        sweep: the validated sweep.
        file: path of the sweep file.
        origins: key as a tuple of names, dotted ones taken apart -> `file:line`.
    """

    sweep: Sweep
    file: str
    origins: dict[Key, str]

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.sweep.name or re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", Path(self.file).stem).lstrip("-")

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(self.sweep.folder or f"runs/sweeps/{self.name}")

    def wrong(self, key: str, problem: str, **more: Any) -> ExperimentErrors:
        """A mistake at a key of the sweep file."""
        return ExperimentErrors([UserError(key, problem, **more)], self.origins, self.file)

    @contextmanager
    def locating(self, origins: dict[Key, str] | None = None) -> Iterator[None]:
        """Context manager that locates mistakes about the folder of the sweep, or of a run with its own origins."""
        try:
            yield
        except UserError as error:
            error.key = "folder" if error.key == "run.folder" else error.key
            error.way_out = error.way_out.replace("`run.folder` or `name`", "`folder` or `name` of the sweep")
            places = {**(origins or {}), ("folder",): self.origins.get(("folder",), self.file)}
            raise ExperimentErrors([error], {**self.origins, **places}, self.file) from error


def read_sweep(file: str | Path, overrides: Sequence[str] = ()) -> SweepSource:
    """Read and validate a sweep file; its experiment is not read yet.

    Args:
        file: path of the sweep file.
        overrides: `key=value` strings, of the sweep's own keys or of keys of the experiment for all runs.

    Raises:
        ExperimentErrors: all mistakes found, each with its key, `file:line`, value and suggested fix.
    """
    if not Path(file).is_file():
        raise ExperimentErrors([UserError("", "there is no such file", way_out="pass the path of a sweep file; "
                                          "configs/sweep-learning-rate.yaml is one")], {}, str(file))
    values, places = read_values(Path(file))
    origins = {tuple(".".join(key).split(".")): place for key, place in places.items()}
    if "student" in values and "experiment" not in values:
        raise ExperimentErrors([UserError("", "this is an experiment, and a sweep is needed here", way_out="write a "
                                          f"file with experiment: {file} and a grid; see limbeck sweep --help")], {},
                               str(file))
    apply_overrides(overrides, values, origins, Sweep.model_fields)
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise ExperimentErrors(mistakes(error, Sweep), origins, str(file)) from error
    source = SweepSource(sweep, str(file), origins)
    if not Path(sweep.experiment).is_file():
        beside = Path(file).parent / sweep.experiment
        raise source.wrong("experiment", "there is no such file", value=sweep.experiment, way_out=f"did you mean "
                           f"{beside}? Paths begin at the working folder" if beside.is_file() else
                           "pass the path of an experiment file, from the working folder")
    return source

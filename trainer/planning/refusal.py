"""The error for a budget that no plan meets: the largest parts of the lowest peak, and changes that do fit.

Every suggested change has been planned.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from strategies.rematerialization.recompute_plan import BudgetError
from trainer.distributed.launch import check_engine
from trainer.distributed.topology import Topology
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.experiment import Experiment
from trainer.run.metrics import readable
from trainer.run.pace import readable_beside

OFFERED = 6  # most suggestions, besides a larger budget
ENOUGH = 4  # suggestions after which no further schedule is searched
SEARCHED = 4  # most changes for which schedules are searched, which takes seconds each
Overrides = dict[str, Any]
Fit = tuple[int, float]
"""A plan that fits: peak memory in bytes, and recomputation as a share of time."""


class Trial(Protocol):
    """A changed experiment to test against its budget. Each test runs only when asked for.

    Attributes:
        peak: peak bytes without recomputation, at the smallest loss tile; None if the experiment cannot be planned.
        possible: whether the weights, gradients and the optimizer's update fit by themselves.
    """

    peak: int | None
    possible: bool

    def as_it_is(self) -> Fit | None:
        """The plan without recomputation, if it fits."""

    def searched(self) -> Fit | None:
        """The plan with the least recomputation found; None if none was found, at once if provably none can fit."""


class _Way(NamedTuple):
    overrides: Overrides
    trial: Trial

    @property
    def key(self) -> str:
        """What is changed. Each optimizer counts as a change of its own: they differ in more than memory."""
        key = next(iter(self.overrides))
        return str(self.overrides[key]) if key == "optimizer.name" else key


class BudgetUnmet(UserError):
    """A budget that no plan meets. The command exits with code 3."""


def refuse(experiment: Experiment, error: BudgetError, moment: str, parts: dict[str, int],
           attempt: Callable[[Experiment], Trial], topology: Topology) -> BudgetUnmet:
    """The error for a budget that cannot be met: the lowest possible peak, its largest parts, and changes that fit.

    Args:
        moment: when the peak of the plan with the lowest peak occurs.
        parts: the bytes at that peak, by kind.
        attempt: returns a changed experiment as a `Trial` against its budget.
    """
    lines = [f"a training step cannot be made to fit: the least that any plan found needs is {readable(error.least)} "
             f"({error.least:,} bytes), and none can need less than "
             f"{readable_beside(error.bound, error.least)}"]
    lines += [f"  the largest parts then, at the peak ({moment}):"]
    lines += [f"    {name:<28} {count:>16,} bytes  {readable(count)}"
              for name, count in sorted(parts.items(), key=lambda part: -part[1]) if count][:7]
    memory, named = experiment.memory, experiment.memory.budget is None
    if int(os.environ.get("RANK", 0)) == 0:
        given = readable_beside(memory.bytes, error.least)
        print(f"{experiment.name}: {given} are too little, looking for what would fit", file=sys.stderr, flush=True)
    ways = [_said(overrides, fit) for overrides, fit in _fitting(experiment, attempt, topology)]
    if not ways:
        ways.append("a smaller model")
    ways.append(f"memory.budget={error.least}" if not named else "a larger memory.device")
    return BudgetUnmet("memory.device" if named else "memory.budget", "\n".join(lines),
                       value=f"{memory.device}, nine tenths of it" if named else memory.budget,
                       way_out="; or ".join(ways))


def _fitting(experiment: Experiment, attempt: Callable[[Experiment], Trial], topology: Topology
             ) -> list[tuple[Overrides, Fit]]:
    """Changes that each fit alone; if there are none, several changes combined.

    Cheap tests come first: a change that fits without recomputation needs no search. Of the rest, at most `SEARCHED`
    are searched. The limit is a count and not a time, so that the suggestions are reproducible.
    """
    ways = [_Way(overrides, attempt(other)) for overrides in _changes(experiment, topology)
            if (other := changed(experiment, overrides, topology)) is not None]
    found: dict[str, tuple[_Way, Fit]] = {}
    for way in ways:
        if way.key not in found and len(found) < OFFERED and (fit := way.trial.as_it_is()):
            found[way.key] = way, fit  # the first value of a key that fits is the smallest change
    strongest: dict[str, _Way] = {}
    for way in [one for one in ways if one.trial.peak is not None]:
        if way.key not in strongest or way.trial.peak < strongest[way.key].trial.peak:
            strongest[way.key] = way
    left = [way for way in strongest.values() if way.key not in found and way.trial.possible]
    for way in sorted(left, key=lambda one: one.trial.peak)[:SEARCHED]:
        if len(found) < ENOUGH and (fit := way.trial.searched()):
            found[way.key] = way, fit
    in_order = [way.key for way in ways]
    offered = [(way.overrides, fit) for way, fit in sorted(found.values(), key=lambda one: in_order.index(one[0].key))]
    return offered or _together(experiment, list(strongest.values()), attempt, topology)


def _together(experiment: Experiment, ways: Sequence[_Way], attempt: Callable[[Experiment], Trial], topology: Topology
              ) -> list[tuple[Overrides, Fit]]:
    """Combine changes, in order, until they fit without recomputation; else try all of them with a schedule search."""
    together: Overrides = {}
    trial: Trial | None = None
    for way in ways:
        other = changed(experiment, {**together, **way.overrides}, topology)
        if other is None:  # the changes are incompatible
            continue
        tried = attempt(other)
        if tried.peak is None or (trial is not None and trial.peak <= tried.peak):
            continue  # it does not help: one optimizer in place of another, for example
        together, trial = {**together, **way.overrides}, tried
        if fit := trial.as_it_is():
            return [(together, fit)]
    fit = trial.searched() if trial is not None and trial.possible else None
    return [(together, fit)] if fit else []


def _said(overrides: Overrides, plan: Fit) -> str:
    text = " ".join(f"{key}={json.dumps(value) if value is None or value is True else value}"
                    for key, value in overrides.items())
    return f"{text} (then {readable(plan[0])}, {plan[1]:.0%} recomputed)"


def changed(experiment: Experiment, overrides: Overrides, topology: Topology) -> Experiment | None:
    """The experiment with some values overridden; None if it is not valid with them."""
    values = experiment.model_dump()
    for key, value in overrides.items():
        *parents, name = key.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[name] = value
    try:
        found = Experiment.model_validate(values)
        check_engine(found.sharding, found.optimizer, topology)
    except (ValidationError, ExperimentErrors, UserError):
        return None
    return found


def _changes(experiment: Experiment, topology: Topology) -> Iterator[Overrides]:
    """Changes that need less memory and affect training little or not at all, then shorter sequences."""
    training, teacher = experiment.training, experiment.teacher
    for smaller in range(training.micro_batch - 1, 0, -1):
        if training.micro_batch % smaller == 0:
            yield {"training.micro_batch": smaller}
    if teacher is not None and teacher.targets.source == "live" and _teachers_own_tokens(experiment):
        yield {"teacher.targets.source": "hidden"}
    if not experiment.optimizer.in_backward and training.batch_size == training.micro_batch * topology.data_parallel:
        yield {"optimizer.in_backward": True} | ({"training.clip": None} if training.clip is not None else {})
    if teacher is not None and teacher.dtype == "float32":
        yield {"teacher.dtype": "bfloat16"}
    if experiment.precision.dtype == "fp32":
        yield {"precision.dtype": "bf16"}
    for name in ("adafactor", "adamw8bit"):
        if experiment.optimizer.name in ("adamw", "lamb", "muon"):
            yield {"optimizer.name": name}
    if teacher is not None and teacher.targets.source in ("live", "hidden") and _teachers_own_tokens(experiment):
        for source in ("samples", "top_k"):
            yield {"teacher.targets.source": source}
    for shorter in (experiment.data.sequence_length // 2, experiment.data.sequence_length // 4):
        if shorter > 1:
            yield {"data.sequence_length": shorter}


def _teachers_own_tokens(experiment: Experiment) -> bool:
    """Whether the student is certain to share its teacher's tokenizer and vocabulary, as cached targets require."""
    own, name = experiment.data.tokenizer, experiment.objective.divergence.name
    return name != "uld" and not own.path and (experiment.student.from_teacher is not None or
                                               not experiment.student.path)

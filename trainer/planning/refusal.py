"""What is said of a budget that no plan meets: where the least goes, and changes that fit, each of them planned."""

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

OFFERED = 6  # ways out at most, besides a larger budget
ENOUGH = 4  # of them: for more no plan is searched
SEARCHED = 4  # changes at most whose blocks are planned inside, which takes seconds each
Overrides = dict[str, Any]
Fit = tuple[int, float]
"""Of a plan that fits: bytes at the peak, and the share of time recomputed."""


class Trial(Protocol):
    """A changed experiment that is held against its budget, no further than it is asked.

    Attributes:
        peak: bytes where nothing is recomputed, at the least tile of the loss; None where it cannot be trained.
        possible: whether weights, their gradients, and what the optimizer does with them fit.
    """

    peak: int | None
    possible: bool

    def as_it_is(self) -> Fit | None:
        """The plan that recomputes nothing, if it fits."""

    def searched(self) -> Fit | None:
        """The plan with the least recomputation found; None at once where no plan can fit, or where none was found."""


class _Way(NamedTuple):
    overrides: Overrides
    trial: Trial

    @property
    def key(self) -> str:
        """What is changed; optimizers differ in more than bytes, so that each is a change of its own."""
        key = next(iter(self.overrides))
        return str(self.overrides[key]) if key == "optimizer.name" else key


class BudgetUnmet(UserError):
    """A budget that no plan meets; the command ends with exit code 3."""


def refuse(experiment: Experiment, error: BudgetError, moment: str, parts: dict[str, int],
           attempt: Callable[[Experiment], Trial], topology: Topology) -> BudgetUnmet:
    """The message for a budget that cannot be met: what is possible, where it goes, and changes that would fit.

    Args:
        moment: when the peak of the plan with the least peak is.
        parts: its bytes by what they are.
        attempt: holds a changed experiment against its budget.
    """
    lines = [f"a training step cannot be made to fit: the least that any plan found needs is {readable(error.least)} "
             f"({error.least:,} bytes), and none can need less than {readable(error.bound)}"]
    lines += [f"  the largest parts then, at the peak ({moment}):"]
    lines += [f"    {name:<28} {count:>16,} bytes  {readable(count)}"
              for name, count in sorted(parts.items(), key=lambda part: -part[1]) if count][:7]
    memory, named = experiment.memory, experiment.memory.budget is None
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{experiment.name}: {readable(memory.bytes)} are too little, looking for what would fit",
              file=sys.stderr, flush=True)
    ways = [_said(overrides, fit) for overrides, fit in _fitting(experiment, attempt, topology)]
    if not ways:
        ways.append("a smaller model")
    ways.append(f"memory.budget={error.least}" if not named else "a larger memory.device")
    return BudgetUnmet("memory.device" if named else "memory.budget", "\n".join(lines),
                       value=f"{memory.device}, nine tenths of it" if named else memory.budget,
                       way_out="; or ".join(ways))


def _fitting(experiment: Experiment, attempt: Callable[[Experiment], Trial], topology: Topology
             ) -> list[tuple[Overrides, Fit]]:
    """Changes that fit, each by itself; where none does, several of them at once.

    Cheap tests come first: what fits as it is needs no search. Of what does not, as much is searched as `SEARCHED` says
    at most, whatever the clock says, so that the same is offered each time.
    """
    ways = [_Way(overrides, attempt(other)) for overrides in _changes(experiment, topology)
            if (other := changed(experiment, overrides, topology)) is not None]
    found: dict[str, tuple[_Way, Fit]] = {}
    for way in ways:
        if way.key not in found and len(found) < OFFERED and (fit := way.trial.as_it_is()):
            found[way.key] = way, fit  # the first of a key that fits changes the least
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
    """The fewest of the first changes that fit together as they are; else all of them, if a plan is found for that."""
    together: Overrides = {}
    trial: Trial | None = None
    for way in ways:
        other = changed(experiment, {**together, **way.overrides}, topology)
        if other is None:  # they do not belong together
            continue
        tried = attempt(other)
        if tried.peak is None or (trial is not None and trial.peak <= tried.peak):
            continue  # one optimizer in place of another, for example
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
    """An experiment with other values; None where they do not belong together."""
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
    """Changes that need fewer bytes: what is learned stays the same, or nearly, or sequences are shorter."""
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
    """Whether the student certainly has its teacher's tokenizer and vocabulary, so that a cache can serve it."""
    own, name = experiment.data.tokenizer, experiment.objective.divergence.name
    return name != "uld" and not own.path and (experiment.student.from_teacher is not None or
                                               not experiment.student.path)

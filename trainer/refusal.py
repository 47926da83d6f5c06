"""What is said of a budget that no plan meets: where the least goes, and changes that fit, each of them planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from strategies.rematerialization.plan import BudgetError
from trainer.engines import check_engine
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.tree import Experiment
from trainer.metrics import readable

OFFERED = 6  # ways out at most, besides a larger budget
Overrides = dict[str, Any]
Fits = Callable[[Experiment], "tuple[int, float] | None"]
"""Plans an experiment within its budget: bytes at the peak, and the share of time recomputed; None where none fits."""


class BudgetUnmet(UserError):
    """A budget that no plan meets; the command ends with exit code 3."""


def refuse(experiment: Experiment, error: BudgetError, moment: str, parts: dict[str, int], fits: Fits,
           processes: int) -> BudgetUnmet:
    """The message for a budget that cannot be met: what is possible, where it goes, and changes that would fit.

    Args:
        moment: when the peak of the plan with the least peak is.
        parts: its bytes by what they are.
        fits: plans a changed experiment.
        processes: that train together.
    """
    lines = [f"a training step cannot be made to fit: the least that any plan found needs is {readable(error.least)} "
             f"({error.least:,} bytes), and none can need less than {readable(error.bound)}"]
    lines += [f"  the largest parts then, at the peak ({moment}):"]
    lines += [f"    {name:<28} {count:>16,} bytes  {readable(count)}"
              for name, count in sorted(parts.items(), key=lambda part: -part[1]) if count][:7]
    memory, named = experiment.memory, experiment.memory.budget is None
    ways = list(_fitting(experiment, fits, processes))
    if not ways:
        ways.append("a smaller model")
    ways.append(f"memory.budget={error.least}" if not named else "a larger memory.device")
    return BudgetUnmet("memory.device" if named else "memory.budget", "\n".join(lines),
                       value=f"{memory.device}, nine tenths of it" if named else memory.budget,
                       way_out="; or ".join(ways))


def _fitting(experiment: Experiment, fits: Fits, processes: int) -> Iterator[str]:
    """Changes that fit, each by itself; where none does, several of them at once."""
    found: set[str] = set()
    possible = [(overrides, other) for overrides in _changes(experiment, processes)
                if (other := changed(experiment, overrides, processes)) is not None]
    for overrides, other in possible:
        key = next(iter(overrides))
        if key in found or len(found) == OFFERED:
            continue  # the first of a key that fits changes the least
        if plan := fits(other):
            found.add(key if key != "optimizer.name" else overrides[key])  # optimizers differ in more than bytes
            yield _said(overrides, plan)
    if found:
        return
    together: Overrides = {}
    for overrides in {next(iter(overrides)): overrides for overrides, _ in possible}.values():  # the last of each key
        if (other := changed(experiment, {**together, **overrides}, processes)) is not None:
            together = {**together, **overrides}
            if len(together) > len(overrides) and (plan := fits(other)):
                yield _said(together, plan)
                return


def _said(overrides: Overrides, plan: tuple[int, float]) -> str:
    text = " ".join(f"{key}={json.dumps(value) if value is None or value is True else value}"
                    for key, value in overrides.items())
    return f"{text} (then {readable(plan[0])}, {plan[1]:.0%} recomputed)"


def changed(experiment: Experiment, overrides: Overrides, processes: int) -> Experiment | None:
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
        check_engine(found, processes)
    except (ValidationError, ExperimentErrors, UserError):
        return None
    return found


def _changes(experiment: Experiment, processes: int) -> Iterator[Overrides]:
    """Changes that need fewer bytes: what is learnt stays the same, or nearly, or sequences are shorter."""
    training, teacher = experiment.training, experiment.teacher
    for smaller in range(training.micro_batch - 1, 0, -1):
        if training.micro_batch % smaller == 0:
            yield {"training.micro_batch": smaller}
    if teacher is not None and teacher.targets.source == "live" and _teachers_own_tokens(experiment):
        yield {"teacher.targets.source": "hidden"}
    if not experiment.optimizer.in_backward and training.batch_size == training.micro_batch * processes:
        yield {"optimizer.in_backward": True} | ({"training.clip": None} if training.clip is not None else {})
    if teacher is not None and teacher.dtype == "float32":
        yield {"teacher.dtype": "bfloat16"}
    if experiment.precision.dtype == "fp32":
        yield {"precision.dtype": "bf16"}
    for name in ("adamw8bit", "adafactor"):
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

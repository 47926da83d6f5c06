"""Settings that optuna proposes from the results of earlier ones.

The record of the sweep is all that is kept: each proposal is made by a study that is built anew from it, in memory. So
a sweep that was killed at any moment goes on with the proposals it would have had, which files of optuna's own would
not promise (a journal whose last line is torn cannot be read again).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from trainer.files import fingerprint
from trainer.sweep.settings import MOST_RUNS, Settings
from trainer.sweep.sweep_file import Parameter, Search, SweepSource

PLACE = "search.space"
MOST_REPEATED = 50  # proposals in a row that are known already, after which nothing new is expected


def check_search(source: SweepSource, settings: Settings) -> None:
    """Check that optuna is there, and that the ends and choices of each parameter make an experiment.

    Raises:
        ExperimentErrors: optuna is not installed, there are too many trials, or a value is no value of its key.
    """
    search, seeds = source.sweep.search, len(source.sweep.seeds or (0,))
    assert search is not None
    if find_spec("optuna") is None:
        raise source.wrong("search", "optuna, which proposes the values, is not installed",
                           way_out="pip install 'limbeck[search]', or name the values in a `grid`")
    if search.trials * seeds > MOST_RUNS:
        raise source.wrong("search.trials", f"these are {search.trials * seeds:,} runs, over {MOST_RUNS:,}",
                           value=search.trials, way_out="name fewer trials or seeds")
    first = {key: _ends(parameter)[0] for key, parameter in search.space.items()}
    settings.make(first, PLACE)
    for key, parameter in search.space.items():
        for value in _ends(parameter)[1:]:
            settings.make({**first, key: value}, PLACE)


def propose(search: Search, highest: bool, known: Sequence[tuple[dict[str, Any], float | None]]
            ) -> dict[str, Any] | None:
    """Values of the next trial, by the tree-structured Parzen estimator (Bergstra et al. 2011) of optuna.

    Args:
        search: what is searched.
        highest: whether the highest result is the best.
        known: values of each earlier trial and its result; None while it runs, and if it failed, which optuna takes for
            a bad result.

    Returns:
        Key -> value; None if nothing new is found any more. The same arguments give the same values.
    """
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(direction="maximize" if highest else "minimize")
    space = {key: _distribution(parameter) for key, parameter in search.space.items()}
    states = optuna.trial.TrialState
    for values, result in known:
        study.add_trial(optuna.trial.create_trial(
            state=states.RUNNING if result is None else states.COMPLETE, value=result, distributions=space,
            params={key: _inner(search.space[key], value) for key, value in values.items()}))
    there = {json.dumps(values, sort_keys=True) for values, _ in known}
    for attempt in range(MOST_REPEATED):
        seed = int(fingerprint([search.seed, len(known), attempt])[:8], 16)
        with warnings.catch_warnings(action="ignore"):  # optuna 4 calls constant_liar experimental
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = study.ask(space)
        values = {key: _outer(search.space[key], value) for key, value in trial.params.items()}
        if json.dumps(values, sort_keys=True) not in there:
            return values
        study.tell(trial, state=states.FAIL)
    return None


def belongs(search: Search, values: dict[str, Any]) -> bool:
    """Whether a trial of an earlier start of the sweep lies in what is searched now."""
    return values.keys() == search.space.keys() and all(_holds(search.space[key], values[key]) for key in values)


def _holds(parameter: Parameter, value: Any) -> bool:
    if parameter.choices is not None:
        return any(_same(value, choice) for choice in parameter.choices)
    return isinstance(value, int | float) and parameter.low <= value <= parameter.high and not (
        _whole(parameter) and isinstance(value, float))


def _ends(parameter: Parameter) -> list[Any]:
    """Values that show whether all of a parameter can be read: its choices, or both ends of its range."""
    return list(parameter.choices) if parameter.choices is not None else [parameter.low, parameter.high]


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices is not None:
        return CategoricalDistribution(range(len(parameter.choices)))
    return (IntDistribution if _whole(parameter) else FloatDistribution)(parameter.low, parameter.high,
                                                                         log=parameter.log)


def _whole(parameter: Parameter) -> bool:
    return isinstance(parameter.low, int) and isinstance(parameter.high, int)


def _inner(parameter: Parameter, value: Any) -> Any:
    """A value as optuna has it: a choice by its place in the list, since choices may be mappings."""
    if parameter.choices is None:
        return value
    return next(place for place, choice in enumerate(parameter.choices) if _same(value, choice))


def _outer(parameter: Parameter, value: Any) -> Any:
    """A value as the experiment has it: numbers of four digits, which fit in the name of a folder."""
    if parameter.choices is not None:
        return parameter.choices[value]
    return value if _whole(parameter) else min(max(float(f"{value:.4g}"), parameter.low), parameter.high)


def _same(one: Any, other: Any) -> bool:
    """Equality that tells 1 from true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)

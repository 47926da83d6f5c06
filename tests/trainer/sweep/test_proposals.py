"""A search finds what is best, goes on as if it had never stopped, and knows nothing but its record."""

import json
import math

from trainer.sweep.proposals import belongs, propose
from trainer.sweep.settings import MOST_RUNS
from trainer.sweep.sweep_file import Search, read_sweep
from trainer.sweep.sweep_plan import SweepPlan

SPACE = {"optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "bits": [2, 4, {"of": 8}],
         "steps": {"low": 1, "high": 9}}


def loss(values):
    """Least at a learning rate of 1e-3, four bits, nine steps."""
    return (math.log10(values["optimizer.lr"]) + 3) ** 2 + (values["bits"] != 4) - values["steps"] / 9


def searched(trials, known=(), highest=False, failing=lambda number: False):
    search, found = Search.model_validate({"trials": trials, "space": SPACE}), list(known)
    while len(found) < trials:
        values = propose(search, highest, found)
        sign = -1 if highest else 1
        found.append((values, None if failing(len(found)) else sign * loss(values)))
    return found


def test_a_search_comes_near_the_best_and_lies_within_its_space():
    for highest in (False, True):
        found = searched(40, highest=highest)
        best = min((values for values, _ in found), key=loss)
        assert loss(best) < min(loss(values) for values, _ in found[:10]) and loss(best) < -0.7
    assert all(1e-5 <= values["optimizer.lr"] <= 0.1 and values["bits"] in SPACE["bits"] and
               values["steps"] in range(1, 10) and isinstance(values["steps"], int) for values, _ in found)
    assert len({json.dumps(values) for values, _ in found}) == 40


def test_a_search_goes_on_as_if_it_had_never_stopped():
    """Also by way of JSON, and where some trials failed."""
    def failing(number):
        return number % 5 == 3

    whole = searched(20, failing=failing)
    known = json.loads(json.dumps(whole[:13]))
    assert searched(20, [(values, result) for values, result in known], failing=failing) == whole


def test_a_search_ends_where_nothing_is_new():
    search, found = Search.model_validate({"trials": 99, "space": {"bits": [2, 4], "tied": [True, 1]}}), []
    while (values := propose(search, False, found)) is not None:
        found.append((values, 1.0))
    assert len(found) == 4


def test_trials_of_an_earlier_space_are_known_if_they_lie_in_this_one():
    search = Search.model_validate({"trials": 9, "space": SPACE})
    inside = {"optimizer.lr": 1e-3, "bits": {"of": 8}, "steps": 3}
    assert belongs(search, inside)
    for other in ({"optimizer.lr": 1.0}, {"bits": 3}, {"steps": 3.5}, {"steps": 10}, {"more": 1}):
        assert not belongs(search, inside | other)


def test_a_plan_proposes_trials_and_takes_those_of_its_record_up_again(write_experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment("base")
    (tmp_path / "s.yaml").write_text("experiment: base.yaml\nseeds: [0, 1]\nsearch: {trials: 3, space: {optimizer.lr: "
                                     "{low: 1e-4, high: 1e-2, log: true}}}\n")
    plan = SweepPlan(read_sweep("s.yaml"))
    assert plan.record.total == 6 and not plan.record.runs and MOST_RUNS >= 6
    pairs = [plan.propose(), plan.propose()]
    assert [len(pair) for pair in pairs] == [2, 2] and {run.seed for run in pairs[0]} == {0, 1}
    plan.folder.path.mkdir(parents=True)
    pairs[0][0].state = "failed"
    plan.folder.write(plan.record)
    again = SweepPlan(read_sweep("s.yaml"))
    assert [run.label for run in again.record.runs] == [pairs[0][0].label, pairs[1][0].label] * 2
    assert again.propose()[0].label == plan.propose()[0].label and not again.propose()
    assert [run.state for run in again.record.runs] == ["failed"] + ["waiting"] * 5

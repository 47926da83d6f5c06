"""Weights, temperature and share that move during a run, and scaled features, in whole trainings of tiny models."""

from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml

from tests.trainer.teacher.test_distilling import bpe, losses, save, with_
from trainer.errors import OtherRun, UserError
from trainer.experiment.load import mistakes, read_experiment
from trainer.experiment.objective_nodes import Objective, OnPolicy
from trainer.experiment.scheduled import shown, value_at
from trainer.run.folder import RunFolder, training_identity
from trainer.run.metrics import read_lines
from trainer.training.step_input import Writer

MOVING = {"cross_entropy": [[0, 1.0], [0.75, 0.25]], "divergence": {
    "name": "jsd", "weight": [[0, 0.0], [0.5, 1.0]], "temperature": [[0, 2.0], [1, 1.0]], "share": [[0, 0.1], [1, 0.5]],
    "normalized": True}, "features": {"weight": [[0, 0.5], [0.5, 0.0]], "scale": "variance",
                                      "projections": "least_squares"}}


@pytest.fixture
def family(tmp_path):
    """A teacher and a smaller student with one tokenizer."""
    tokenizer = bpe(300)
    return {"teacher": {"path": save(tmp_path / "large", tokenizer, seed=1, hidden_size=48)},
            "student": {"path": save(tmp_path / "small", tokenizer)}, "data": {"tokenizer": {"train_vocabulary": None}}}


def test_points_are_joined_by_straight_lines():
    points = ((0.0, 1.0), (0.25, 3.0), (0.5, 0.0))
    for fraction in numpy.linspace(0, 1, 33):
        assert value_at(points, fraction) == pytest.approx(numpy.interp(fraction, *zip(*points, strict=True)))
    assert shown(points) == "1 -> 3 (at 25%) -> 0 (at 50%)" and shown(0.5) == "0.5"


def test_each_step_has_the_weights_of_its_moment_and_goes_on_bitwise(train_here, family):
    trainer = train_here("whole", **with_(family, objective=MOVING))
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    for step, line in enumerate(lines):
        fraction = step / 4
        cross_entropy, weight, features = (numpy.interp(fraction, *points) for points in (
            ([0, 0.75], [1, 0.25]), ([0, 0.5], [0, 1]), ([0, 0.5], [0.5, 0])))
        share = 0.1 + 0.4 * fraction
        assert line["loss"] == pytest.approx(
            cross_entropy * line["cross_entropy"] + weight * line.get("jsd", 0) / (share * (1 - share))
            + features * line["features"], rel=1e-5)
        assert line["scheduled"]["objective.divergence.temperature"] == pytest.approx(2 - fraction)
    assert "jsd" not in lines[0] and "jsd" in lines[1], "a divergence without weight is not computed"
    assert 0 < lines[0]["features"] < 1.5, "fitted projections explain some of the teacher's variance"
    saving = {"training": {"checkpoint_every": 2}}
    train_here("parts", until=3, **with_(family, objective=MOVING, **saving))
    parts = train_here("parts", **with_(family, objective=MOVING, **saving))
    assert losses(parts)[-2:] == losses(trainer)[-2:]
    for one, other in zip(trainer.unwrapped.parameters(), parts.unwrapped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_whose_weights_move_is_not_made_longer(write_experiment, train_here):
    moving = {"objective": {"cross_entropy": [[0, 1.0], [1, 0.5]]}}
    train_here("run", **moving)
    experiment = read_experiment(write_experiment("run", **moving, training={"steps": 8})).experiment
    with pytest.raises(OtherRun, match="training.steps was 4 and is 8") as refused:
        RunFolder(experiment.folder).check(experiment)
    assert "objective.cross_entropy follows a schedule over the whole run" in refused.value.way_out


def test_a_run_of_a_version_without_scales_goes_on_as_it_began(write_experiment, tmp_path):
    """Today's defaults are others; under them it would go on with another loss."""
    as_before = {"features": {"scale": "none", "projections": "random"}}
    ours = {"teacher": {"path": "some/teacher"}, "objective": as_before}
    values = read_experiment(write_experiment("run", **ours)).experiment.model_dump(mode="json")
    for key in as_before["features"]:
        del values["objective"]["features"][key]
    del values["objective"]["divergence"]["normalized"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.yaml").write_text(yaml.safe_dump(values))
    folder = RunFolder(tmp_path / "run")
    folder.check(read_experiment(write_experiment("run", **ours)).experiment)
    with pytest.raises(OtherRun, match="objective.features.projections was 'random'") as refused:
        folder.check(read_experiment(write_experiment("run", **ours | {"objective": {"features": {}}})).experiment)
    assert "write `objective.features.projections: random`, `objective.features.scale: none`" in refused.value.way_out


@pytest.mark.parametrize(("name", "share", "weight"), [
    ("jsd", None, 4.0), ("jsd", 0.1, 1 / 0.09), ("skewed_kl", None, 1 / 0.81), ("skewed_reverse_kl", 0.5, 4.0),
    ("forward_kl", None, 1.0), ("total_variation", None, 1.0), ("uld", None, 1.0)])
def test_weights_mean_the_same_unless_the_file_says_otherwise(name, share, weight):
    """By the curvature of each: s (1 - s) of a mixture, (1 - s) squared of a skewed one."""
    asked = {"name": name, "share": share, "weight": 1.0}
    for value, wanted in (({}, weight), ({"normalized": None}, weight), ({"normalized": False}, 1.0)):
        objective = Objective.model_validate({"divergence": asked | value})
        again = Objective.model_validate(objective.model_dump(mode="json"))
        for one in (objective, again):
            assert one.build(True).divergences[0].factor == pytest.approx(wanted)


def test_a_mixture_of_a_version_that_did_not_normalize_it_goes_on_as_it_began(write_experiment, tmp_path):
    jsd = {"teacher": {"path": "some/teacher"}, "objective": {"divergence": {"name": "jsd"}}}
    values = read_experiment(write_experiment("run", **jsd)).experiment.model_dump(mode="json")
    del values["objective"]["divergence"]["normalized"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.yaml").write_text(yaml.safe_dump(values))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(OtherRun, match="objective.divergence.normalized"):
        folder.check(read_experiment(write_experiment("run", **jsd)).experiment)
    jsd["objective"]["divergence"]["normalized"] = False
    folder.check(read_experiment(write_experiment("run", **jsd)).experiment)


def test_what_an_earlier_version_cached_is_still_found(write_experiment):
    identity = training_identity(read_experiment(write_experiment()).experiment)
    assert "objective.divergence.normalized" not in identity


@pytest.mark.parametrize(("value", "problem"), [
    ([[0, 1], [0.5, -1]], "greater than or equal to 0"), ([[0.1, 1]], "the first is 0"), ([1, 2], "no list of points"),
    ([[0, 1], [0.5, 1], [0.5, 2]], "fractions of a schedule rise"), ([[0, 1], [20, 1]], "from 0 to 1, and 20 is none"),
    ({"0": 3, "0.5": 0}, "no list of points"), ([[0, 1], [-0.5, 1]], "and -0.5 is none"),
    ([], "no list of points"), (-1, "greater than or equal to 0"), ("much", "valid number")])
def test_a_schedule_that_is_none(value, problem):
    with pytest.raises(ValueError) as error:
        Objective.model_validate({"features": {"weight": value}})
    found, = mistakes(error.value, Objective)
    assert found.key == "features.weight" and problem in found.problem and found.way_out


@pytest.mark.parametrize(("objective", "source", "key", "problem"), [
    ({"cross_entropy": [[0, 1], [0.5, 0]], "divergence": {"weight": 0}}, "live", "objective.cross_entropy",
     "zero at 50% of the run"),
    ({"divergence": {"temperature": [[0, 2], [1, 1]]}}, "top_k", "objective.divergence.temperature",
     "top_k are cached at one temperature"),
    ({"divergence": {"weight": [[0, 0], [1, 1]]}, "on_policy": {}}, "live", "objective.on_policy", "nobody judges"),
    ({"divergence": {"name": "total_variation", "normalized": True}}, "live", "objective.divergence.normalized",
     "no curvature"),
])
def test_a_schedule_that_does_not_fit_the_rest(write_experiment, objective, source, key, problem):
    file = write_experiment(teacher={"path": "some/teacher", "targets": {"source": source}}, objective=objective)
    with pytest.raises(Exception) as error:
        read_experiment(file)
    found = error.value.errors[0]
    assert isinstance(found, UserError) and found.key == key and problem in found.problem, found


def test_the_last_moment_is_no_step():
    assert Objective(cross_entropy=[[0, 1], [1, 0]]).idle_at(False) is None
    assert Objective(cross_entropy=[[0, 1], [0.9, 0]]).idle_at(False) == 0.9
    assert Objective(cross_entropy=[[0, 1], [0.9, 0]]).idle_at(True) is None


def test_the_student_may_write_more_and_more():
    """Which steps it writes follows from seed and step alone, so that a run that resumes writes the same."""
    steps, asked = 400, OnPolicy(fraction=[[0, 0.0], [1, 1.0]])
    text = SimpleNamespace(tokenizer=None)
    writers = [Writer(asked, 3, SimpleNamespace(steps=steps), None, text, None, None) for _ in range(2)]
    written = [[writer.writes(step) for step in range(steps)] for writer in writers]
    assert written[0] == written[1]
    quarters = [sum(written[0][begin:begin + 100]) for begin in range(0, steps, 100)]
    assert quarters == sorted(quarters) and quarters[0] < 25 and quarters[-1] > 75
    with pytest.raises(ValueError, match="never writes"):
        OnPolicy(fraction=[[0, 0.0], [1, 0.0]])

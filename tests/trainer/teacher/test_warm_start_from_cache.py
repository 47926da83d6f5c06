"""A warm start from cached targets: the first steps need no teacher, the others ask it, or let the student write."""

import pytest

from tests.conftest import merge
from tests.trainer.teacher.test_distilling import bpe, losses, save
from trainer.errors import ExperimentErrors
from trainer.experiment.load import read_experiment
from trainer.run.metrics import read_lines

CACHED = {"teacher": {"targets": {"source": "top_k", "k": 20}}}


@pytest.fixture
def family(tmp_path):
    tokenizer = bpe(300)
    return {"teacher": {"path": save(tmp_path / "large", tokenizer, seed=1, hidden_size=48)},
            "student": {"path": save(tmp_path / "small", tokenizer)}, "data": {"tokenizer": {"train_vocabulary": None}},
            "objective": {"cross_entropy": 0.5, "divergence": {"temperature": 1.0}},
            "training": {"steps": 4, "evaluate_every": 4, "checkpoint_every": 2}}


def test_the_first_steps_are_those_of_a_cache_and_the_others_ask_the_teacher(train_here, family):
    cached = train_here("cached", **merge(family, CACHED))
    warm = merge(merge(family, CACHED), {"teacher": {"targets": {"until": 0.5}}})
    trainer = train_here("warm", **warm)
    assert losses(trainer)[:2] == losses(cached)[:2]
    assert losses(trainer)[2] > losses(cached)[2], "the tail of its distribution counts too"
    assert trainer.teacher is not None and trainer.plan.memory.parts["teacher"] > 0
    train_here("again", until=3, **warm)
    assert losses(train_here("again", **warm)) == losses(trainer), "also after a stop"


def test_a_student_writes_only_after_its_warm_start(train_here, family):
    trainer = train_here("writes", **merge(merge(family, CACHED), {
        "teacher": {"targets": {"until": 0.5}}, "objective": {"on_policy": {"fraction": 1.0, "new_tokens": 4}}}))
    by_text = ["cross_entropy" in line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    assert by_text == [True, True, False, False]


@pytest.mark.parametrize(("targets", "objective", "key", "said"), [
    ({"until": 0.5}, {}, "teacher.targets.until", "from targets in a cache"),
    ({"until": 0.5, "source": "hidden"}, {}, "teacher.targets.until", "samples or top_k"),
    ({"source": "top_k"}, {"on_policy": {}}, "teacher.targets.source", "set teacher.targets.until"),
    ({"source": "top_k", "until": 0.5}, {"features": {}}, "objective.features", "what is inside of it")])
def test_what_does_not_go_together(write_experiment, family, targets, objective, key, said):
    with pytest.raises(ExperimentErrors) as error:
        read_experiment(write_experiment(**merge(family, {"teacher": {"targets": targets}, "objective": objective})))
    [one] = error.value.errors
    assert one.key == key and said in f"{one.problem} {one.way_out}"

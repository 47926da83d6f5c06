"""Several teachers in whole trainings: weights, caches, plans, and what is refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig

from tests.conftest import merge
from tests.trainer.teacher.test_distilling import bpe, first, losses, relative, save
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import read_experiment
from trainer.preparation import _with_revisions
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines


@pytest.fixture
def family(tmp_path):
    """Two teachers and a smaller student with one tokenizer."""
    tokenizer = bpe(300)
    large, other = (save(tmp_path / f"large-{seed}", tokenizer, seed=seed, hidden_size=48) for seed in (1, 2))
    return {"teacher": {"path": large, "weight": 3, "others": [{"path": other, "weight": 1}]},
            "student": {"path": save(tmp_path / "small", tokenizer)}, "data": {"tokenizer": {"train_vocabulary": None}},
            "objective": {"cross_entropy": 0.5, "divergence": {"temperature": 1.0}},
            "training": {"steps": 3, "evaluate_every": 3, "checkpoint_every": 3}}


@pytest.fixture(scope="module")
def known():
    """What has been trained once for all tests."""
    return {}


@pytest.fixture
def live(train_here, family, known):
    """Losses with live teachers."""
    if "live" not in known:
        known["live"] = losses(train_here("live", **family))
    return known["live"]


def test_each_teacher_has_its_share_and_is_planned_for(train_here, family):
    trainer = train_here("both", **family)
    line = first(trainer)
    assert line["loss"] == pytest.approx(0.5 * line["cross_entropy"] + 0.75 * line["forward_kl"]
                                         + 0.25 * line["forward_kl_2"], rel=1e-5)
    size = sum(one.nbytes for one in (*trainer.teacher.parameters(), *trainer.teacher.buffers()))
    assert trainer.plan.memory.parts["teacher"] == 2 * size
    [measured] = [line["memory"]["peak"] for line in read_lines(trainer.folder.metrics) if "memory" in line]
    assert 0.8 * trainer.plan.memory.peak <= measured <= trainer.plan.memory.peak


@pytest.mark.parametrize(("source", "apart"), [("hidden", 1e-6), ("top_k", 0.02)])
def test_each_has_a_cache_of_its_own(train_here, family, live, source, apart, tmp_path):
    cached = train_here("cached", **merge(family, {"teacher": {"targets": {
        "source": source, "k": 100, "path": str(tmp_path / "kept")}}}))
    assert relative(live, losses(cached)) < apart
    assert cached.teacher is None and (tmp_path / "kept" / "other-0").is_dir()


def test_turns_change_nothing_but_the_plan_for_a_gpu(train_here, family, live, write_experiment):
    from trainer.pipeline import planned

    turns = merge(family, {"teacher": {"take_turns": True}})
    assert losses(train_here("turns", **turns)) == live
    on_gpu = {"memory": {"device": "h200"}}
    sizes = [planned(read_experiment(write_experiment("gpu", **merge(one, on_gpu)))).memory.parts["teacher"]
             for one in (turns, family)]
    assert 2 * sizes[0] == sizes[1]


def test_another_numbers_its_tokens_otherwise(train_here, family, live, tmp_path):
    """The same model with its tokens in other rows teaches the same."""
    tokenizer = bpe(300)
    told = json.loads(tokenizer.to_str())
    size = len(told["model"]["vocab"])
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(1)).tolist()
    told["model"]["vocab"] = {token: rows[at] for token, at in told["model"]["vocab"].items()}
    for token in told["added_tokens"]:
        token["id"] = rows[token["id"]]
    moved = save(tmp_path / "other-rows", Tokenizer.from_str(json.dumps(told)), size=size, seed=2, rows=rows,
                 hidden_size=48)
    found = losses(train_here("moved", **merge(family, {"teacher": {"others": [{"path": moved}]}})))
    assert relative(live, found) < 1e-5


@pytest.mark.parametrize(("changes", "key", "said"), [
    ({"teacher": {"others": [{"weight": 2}]}}, "teacher.others.0.path", "has weights of its own"),
    ({"teacher": {"others": [{"path": "a/b", "weight": 0}]}}, "teacher.others.0.weight", "greater than 0"),
    ({"teacher": {"others": [], "weight": 1, "take_turns": True}}, "teacher.take_turns", "there is one teacher"),
    ({"teacher": {"take_turns": True, "targets": {"source": "top_k"}}}, "teacher.take_turns", "not asked in training"),
    ({"teacher": {"others": [], "weight": 2}}, "teacher.weight", "which has all of the divergence"),
    ({"teacher": {"take_turns": True}, "objective": {"features": {}}}, "teacher.take_turns", "need it all the time"),
    ({"teacher": {"take_turns": True, "path": "a/b"}, "student": {"path": "a/b", "architecture": None, "adapter": {}}},
     "teacher.take_turns", "is the base of the student's adapter"),
    ({"sharding": {"engine": "fsdp2"}}, "teacher.others", "fsdp2 shards one teacher"),
    ({"objective": {"divergence": {"weight": 0}}}, "teacher.others", "compares nothing with what they say"),
    ({"teacher": {"path": None, "train": {"steps": 3}, "architecture": {"model_type": "llama"}}}, "teacher.others",
     "is the only one")])
def test_what_does_not_go_together(write_experiment, family, changes, key, said):
    with pytest.raises(ExperimentErrors) as error:
        read_experiment(write_experiment(**merge(family, changes)))
    [one] = error.value.errors
    assert one.key == key and said in one.problem


def test_a_teacher_with_another_tokenizer_is_refused_by_its_name(train_here, family, tmp_path):
    path = save(tmp_path / "strange", bpe(280), seed=4)
    with pytest.raises(UserError, match="strange has another tokenizer than the student"):
        train_here("other", **merge(family, {"teacher": {"others": [{"path": path}]}}))
    with pytest.raises(UserError) as error:
        train_here("missing", **merge(family, {"teacher": {"others": [{"path": "./nowhere"}]}}))
    assert error.value.key == "teacher.others.0.path"


def test_a_card_names_them_all(write_experiment, family):
    from trainer.run.model_card import _opening

    values = read_experiment(write_experiment(**family)).experiment.model_dump(mode="json")
    said = _opening(values, [], {"bytes on disk": 9, "parameters": 2}, None)
    assert "distilled from `large-1` and `large-2`, begun as `small`" in said


def test_the_commit_of_each_is_recorded_and_asking_for_none_is_no_change(write_experiment):
    """So that the recorded experiment loads the same after a branch of the hub has moved."""
    file = write_experiment("run", teacher={"path": "a/first", "others": [{"path": "a/second"}, {"path": "here"}]})
    asked = read_experiment(file, []).experiment
    first, other = LlamaConfig(), LlamaConfig()
    first._commit_hash = "1" * 40
    pinned = _with_revisions(asked, first, other, ["2" * 40, None])
    assert [pinned.teacher.revision, *(one.revision for one in pinned.teacher.others)] == ["1" * 40, "2" * 40, None]
    folder = RunFolder(asked.folder)
    folder.claim(pinned, {})
    assert not folder.changed(asked.model_dump(mode="json"))
    moved = read_experiment(file, ["teacher.others=[{path: a/second, revision: dev}, {path: here}]"]).experiment
    assert list(folder.changed(moved.model_dump(mode="json"))) == ["teacher.others"]

"""Mistakes with early exits: each has one message before anything is trained, and its way out works."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from strategies.pruning.early_exit.exit_heads import attach_exits
from trainer.early_checks import check_early
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import read_experiment
from trainer.models.build import shape_of
from trainer.teacher.exit_losses import settle_exits

CLASSES = {"task": "sequence_classification", "class_names": ["a", "b"]}
IMAGES = {"task": "image_classification", "class_names": ["a", "b"], "images": {"size": 32}}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def mistake(write_experiment, exits, **changes):
    """The one mistake of an experiment with these exits."""
    file = write_experiment(objective={"early_exits": exits, **changes.pop("objective", {})}, **changes)
    with pytest.raises((UserError, ExperimentErrors)) as caught:
        check_early(read_experiment(file).experiment)
    error = caught.value
    if isinstance(error, ExperimentErrors):
        assert len(error.errors) == 1
        error = error.errors[0]
    assert error.way_out
    return error


@pytest.mark.parametrize(("layers", "problem", "way_out"), [
    ([], "no exit without a block", "[1]"), ([2], "is the last one", "write [0]"), ([1, 7], "no block 7", "write [1]"),
    ([-1, 1], "counted from 0", "write [1]"), ([1, 0], "from the first to the last", "write [0, 1]"),
    ([0, 0], "once each", "write [0]")])
def test_layers(write_experiment, layers, problem, way_out):
    error = mistake(write_experiment, {"layers": layers})
    assert error.key == "objective.early_exits.layers" and problem in error.problem and way_out in error.way_out
    if layers:
        check_early(read_experiment(write_experiment(objective={"early_exits": {
            "layers": eval(way_out.removeprefix("write "))}})).experiment)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.2])
def test_thresholds_are_probabilities(write_experiment, threshold):
    error = mistake(write_experiment, {"layers": [0], "threshold": threshold})
    assert error.key == "objective.early_exits.threshold" and "above 0, and at most 1" in error.problem


@pytest.mark.parametrize(("changes", "key", "problem"), [
    ({"sharding": {"engine": "fsdp2"}}, "sharding.engine", "beside whole weights"),
    ({"sharding": {"engine": "zero"}}, "sharding.engine", "beside whole weights"),
    ({"training": {"steps": 0}, "student": {"path": "some/model", "architecture": None}}, "training.steps",
     "exits are trained"),
    ({"teacher": {"path": "some/model"}, "objective": {"on_policy": {}}}, "objective.on_policy", "has no targets"),
    ({"student": {"path": "some/model", "architecture": None, "adapter": {}}, "export": {"adapter": "separate"}},
     "export.adapter", "with a whole model"),
    ({"student": {"trust_remote_code": True}}, "objective.early_exits", "ships with a model")])
def test_what_exits_do_not_go_with(write_experiment, changes, key, problem):
    error = mistake(write_experiment, {"layers": [0]}, **changes)
    assert error.key == key and problem in error.problem and "remove objective.early_exits" in error.way_out


def test_a_model_without_blocks(write_experiment):
    error = mistake(write_experiment, {"layers": [0]}, student={"architecture": RESNET}, data={
        **IMAGES, "path": "some/images", "tokenizer": {}})
    assert error.key == "objective.early_exits" and "no list of blocks" in error.problem
    assert "remove objective.early_exits" in error.way_out


def test_a_model_that_does_more_than_a_norm_before_its_head(monkeypatch):
    """It is found by running it, since nothing else tells."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2))
    model.config.architectures = ["GPT2LMHeadModel"]
    attach_exits(model, [0])
    settle_exits(model, shape_of(model))
    with pytest.raises(UserError, match="not known here"):
        settle_exits(model, None)
    plain = model.transformer.forward

    def more(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state.tanh()
        return found

    monkeypatch.setattr(model.transformer, "forward", more)
    with pytest.raises(UserError, match="more between its blocks and its head than a norm") as caught:
        settle_exits(model, shape_of(model))
    assert caught.value.key == "objective.early_exits" and model.training

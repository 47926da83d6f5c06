"""A student that is pruned before it is trained, in whole runs."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.distillation.losses.tiled_loss import IGNORED
from tests.conftest import TINY
from tests.trainer.test_classification import images  # noqa: F401 - a fixture
from trainer.errors import UserError
from trainer.experiment.pruning_nodes import Prune
from trainer.student.export_student import export
from trainer.student.prune_student import _check_targets

TEACHER = {**TINY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SHORT = {"steps": 2, "batch_size": 4, "micro_batch": 4}


def test_a_student_is_cut_from_its_teacher_and_trained(run_experiment, tmp_path):
    """The exported shapes are those of the cut; before any step the student is the folder `cut`, to the bit."""
    prune = {"kv_heads": 1, "mlp": 0.5, "layers": 2, "importance": "gradient", "calibration_rows": 8}
    _, folder = run_experiment(
        "run", teacher={"architecture": TEACHER, "train": {"steps": 4}},
        student={"architecture": None, "from_teacher": "all", "prune": prune}, training={**SHORT, "steps": 0},
        report={"control": False}, run={"cache": str(tmp_path / "own")})
    config = AutoConfig.from_pretrained(folder.student)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.intermediate_size) == (2, 2, 1, 8, 32)
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder.student, folder.cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    record = json.loads((folder.cut / "prune.json").read_text())
    assert [step["kind"] for step in record["prune"]["steps"]] == ["layers", "heads", "mlp"]
    assert record["parameters"] == record["prune"]["after"]["parameters"] < record["parameters_before"]
    assert (export(folder.path, "onnx") / "receipt.json").exists()  # later, and of the shapes that are left


def test_a_cut_that_the_configuration_cannot_say_is_refused_before_the_teacher_is_trained(run_experiment, tmp_path):
    with pytest.raises(UserError) as caught:
        run_experiment("run", teacher={"architecture": TEACHER, "train": {"steps": 4}}, training=SHORT,
                       student={"architecture": None, "from_teacher": "all", "prune": {"heads": 3}},
                       run={"cache": str(tmp_path / "own")})
    assert caught.value.key == "student.prune.heads" and "the nearest that can" in caught.value.way_out
    assert not list((tmp_path / "own").glob("teachers/*"))


@pytest.mark.parametrize("targets, said", [([[IGNORED, IGNORED]], "none has a target"), ([1, 1], "are the same")])
def test_a_gradient_needs_targets_that_differ(targets, said):
    with pytest.raises(UserError, match=said) as caught:
        _check_targets(torch.tensor(targets), Prune(mlp=0.5, importance="gradient"))
    assert caught.value.key == "student.prune.importance"


def test_channels_of_a_convolutional_student_are_cut_by_the_gradient(run_experiment, images, tmp_path):  # noqa: F811
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
              "layer_type": "basic"}
    _, folder = run_experiment(
        "run", teacher={"architecture": resnet, "train": {"steps": 8, "lr": 1e-2}}, report={"control": False},
        student={"architecture": None, "from_teacher": "all", "prune": {"channels": 0.5, "importance": "gradient"}},
        data={"task": "image_classification", "path": str(images / "train.npz"),
              "validation": {"path": str(images / "test.npz"), "rows": 16}}, run={"cache": str(tmp_path / "own")},
        training={"steps": 2, "batch_size": 8, "micro_batch": 8})
    config = AutoConfig.from_pretrained(folder.student)
    assert (config.embedding_size, config.hidden_sizes) == (4, [4, 8])
    assert json.loads((folder.cut / "prune.json").read_text())["prune"]["steps"][0]["difference"] < 1e-12


def test_a_run_that_goes_on_keeps_the_cut_that_it_began_with(run_experiment):
    _, before = run_experiment("before", training={"steps": 1})
    student = {"architecture": None, "path": str(before.student), "sparsity": {"method": "wanda", "sparsity": 0.5}}
    made = []
    for training in ({"steps": 1, "micro_batch": 8}, {"steps": 2, "micro_batch": 4}):
        _, folder = run_experiment("run", training=training, student=student,
                                   data={"tokenizer": {"train_vocabulary": None}})
        made.append((folder.cut / "prune.json").stat().st_mtime_ns)
    assert made[0] == made[1] and folder.reached == 2


def test_a_cut_of_other_weights_is_made_again(run_experiment, tmp_path):
    """A run that was killed before it trained cuts the weights that are there now, not those that were there then."""
    _, before = run_experiment("before", training={"steps": 1})
    model, embeddings = AutoModelForCausalLM.from_pretrained(before.student), []
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(value)
        model.save_pretrained(before.student)
        _, folder = run_experiment(
            "run", training={"steps": 0}, data={"tokenizer": {"train_vocabulary": None}}, student={
                "architecture": None, "path": str(before.student), "prune": {"mlp": 0.5, "importance": "magnitude"}})
        cut = AutoModelForCausalLM.from_pretrained(folder.cut)
        embeddings.append(cut.get_input_embeddings().weight.mean().item())
        for entry in folder.path.iterdir():  # what is there right after the cut
            if entry != folder.cut and not entry.name.startswith("."):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert embeddings == [1.0, 2.0]

"""A student that starts as its whole teacher."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.trainer.test_classification import images  # noqa: F401 - a fixture

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "layer_type": "basic"}


@pytest.mark.parametrize("quantization", [None, {"method": "rtn", "bits": 8}])
def test_a_net_without_a_list_of_layers_is_taken_over_whole(run_experiment, images, tmp_path, quantization):  # noqa: F811
    """Its weights are the teacher's to the bit, or as rounded; nothing is trained."""
    _, folder = run_experiment(
        "run", teacher={"architecture": RESNET, "train": {"steps": 8, "lr": 1e-2}},
        student={"architecture": None, "from_teacher": "all", "quantization": quantization}, report={"control": False},
        data={"task": "image_classification", "path": str(images / "train.npz"),
              "validation": {"path": str(images / "test.npz"), "rows": 16}}, run={"cache": str(tmp_path / "own")},
        training={"steps": 0, "batch_size": 8, "micro_batch": 8})
    found = json.loads(folder.comparison.read_text())
    assert abs(found["student"]["accuracy"] - found["teacher"]["accuracy"]) <= (0 if quantization is None else 0.1)
    assert found["student"]["parameters"] == found["teacher"]["parameters"]
    if quantization is None:
        (teacher,) = (tmp_path / "own").glob("teachers/*/student")
        one, two = (AutoModelForImageClassification.from_pretrained(path).state_dict()
                    for path in (folder.student, teacher))
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert "begun as the whole of a teacher of its own" in (folder.student / "README.md").read_text()

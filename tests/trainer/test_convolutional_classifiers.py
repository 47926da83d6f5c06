"""Whole runs of convolutional nets: batch norms in training, in checkpoints, on two processes, and in files."""

import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)

from tests.conftest import on_two_ranks, train_py
from trainer.data.dataset import prepare_text
from trainer.distributed.topology import Topology
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of 16 x 16 pixels of two classes, bright above or below; of the test rows, files in folders, too."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 12)):
        labels = np.arange(count) % 2
        pixels = draw.integers(0, 100, (count, 16, 16)).astype(np.uint8)
        for number, (one, label) in enumerate(zip(pixels, labels, strict=True)):
            one[8 * label:8 * label + 8] += 150
            if name == "test":
                file = folder / "files" / ("below" if label else "above") / f"{number:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(one).save(file)
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.where(labels == 1, "below", "above"))
    return folder


def of_images(images, channels=1, **student):
    """What differs in an experiment on these images."""
    return {"student": {"architecture": RESNET, **student}, "report": {"control": False},
            "data": {"task": "image_classification", "path": str(images / "train.npz"),
                     "validation": {"path": str(images / "files"), "rows": 12},
                     "tokenizer": {"train_vocabulary": None}, "images": {"size": 16, "channels": channels}}}


TRAINING = {"steps": 6, "batch_size": 8, "micro_batch": 4, "evaluate_every": 3, "checkpoint_every": 2}


def saved(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoints / f"step-{step:08}" / "model.safetensors")


def test_a_distilled_net_of_4_bits_has_its_numbers_in_two_runtimes(run_experiment, images):
    """Features of stages teach it; the file holds a byte for each number; transformers' pipeline names its classes."""
    values = of_images(images, channels=3, quantization={"bits": 4})
    teacher = {**RESNET, "hidden_sizes": [16, 16, 24], "depths": [1, 1, 1]}
    _, folder = run_experiment(
        "run", **values, teacher={"architecture": teacher, "train": {"steps": 10, "lr": 5e-3}}, optimizer={"lr": 5e-3},
        objective={"features": {"weight": 0.1}}, export={"to": ["onnx"]}, training={**TRAINING, "steps": 10,
                                                                                    "evaluate_every": 5})
    receipts = [json.loads((folder.path / name / "receipt.json").read_text()) for name in ("student", "student-onnx")]
    assert all(one["holds"] for one in receipts) and receipts[0]["accuracy"] == receipts[1]["accuracy"]
    assert receipts[0]["largest_difference"] == 0.0
    assert any("features" in line for line in read_lines(folder.metrics))
    stored = load_file(folder.student / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("convolution.weight")} == {torch.int8}
    nodes = [node.op_type for node in onnx.load(folder.path / "student-onnx" / "model.onnx").graph.node]
    assert "BatchNormalization" not in nodes and nodes.count("Conv") == 6
    assert receipts[0]["notes"] == [
        "its numbers of 4 bits take a byte each: transformers reads no packed format of convolutions"]
    named = pipeline("image-classification", model=str(folder.student))
    model = AutoModelForImageClassification.from_pretrained(folder.student).eval()
    processor = AutoImageProcessor.from_pretrained(folder.student)
    right = []
    for file in sorted((images / "files").rglob("*.png")):
        with torch.no_grad():
            scores = model(**processor(Image.open(file), return_tensors="pt")).logits[0].softmax(-1)
        answer = named(str(file))[0]
        assert answer["label"] == model.config.id2label[int(scores.argmax())]
        assert answer["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        right.append(answer["label"] == file.parent.name)
    assert np.mean(right) == pytest.approx(receipts[0]["accuracy"])


def test_an_interrupted_net_goes_on_to_the_bit(train_here, images):
    """Its running statistics with it."""
    values = of_images(images)
    train_here("cut", until=4, **values, training=TRAINING)
    again = train_here("cut", **values, training=TRAINING)
    whole = train_here("whole", **values, training=TRAINING)
    ours, theirs = saved(again.folder, 6), saved(whole.folder, 6)
    assert sum("running_" in name for name in theirs) == 12 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert theirs["resnet.embedder.embedder.normalization.num_batches_tracked"] == 6 * 2  # each micro-batch is one


def test_a_skipped_step_and_filled_up_rows_leave_the_statistics_good(train_here, images):
    """The loss of one step is made infinite; the last batch of 40 rows in batches of 16 has 8 fillers."""
    values = of_images(images)
    values["data"]["images"]["shift"] = 1
    training = {"epochs": 1, "steps": None, "batch_size": 16, "micro_batch": 16, "evaluate_every": 3}
    trainer = train_here("run", until=1, **values, training=training)
    before = {name: buffer.clone() for name, buffer in trainer.unwrapped.named_buffers()}
    inputs = trainer.inputs()
    loss = trainer._loss
    trainer._loss = lambda batch: (loss({**batch, "pixel_values": batch["pixel_values"] * float("inf")}))
    record = type(trainer).train_step(trainer, inputs)
    assert record["nonfinite"][0]["micro_batch"] == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in trainer.unwrapped.named_buffers())
    rows = trainer.text.train
    order = rows.order(0)
    filler = rows[order.filler(41)]
    assert filler["row"] == -1 and filler["length"] == 0 and filler["targets"] == -100
    assert torch.equal(filler["pixel_values"], rows[order[41] % len(rows)]["pixel_values"])


def test_two_processes_have_the_mean_of_their_statistics(write_experiment, images):
    """Both count: the first norm sees the same images in the first step as one process does in two micro-batches."""
    file = write_experiment("two", **of_images(images), optimizer={"lr": 1e-9},
                            training={**TRAINING, "steps": 1, "evaluate_every": 1, "checkpoint_every": 1})
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = saved(RunFolder(file.parent / "two"), 1)
    name = "resnet.embedder.embedder.normalization.running_mean"
    model = AutoModelForImageClassification.from_pretrained(file.parent / "two" / "student").train()
    rows = prepare_text(read_experiment(file, []).experiment).train
    order = rows.order(0)
    with torch.no_grad():
        means = [model.resnet.embedder.embedder.convolution(torch.stack(
            [rows[order[number]]["pixel_values"] for number in range(begin, begin + 4)])).mean((0, 2, 3))
            for begin in (0, 4)]
    torch.testing.assert_close(found[name], 0.1 * torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "changes"), [
    ("bfloat16", {}), ("float32", {"sharding": {"engine": "fsdp2"}, "precision": {"dtype": "bf16"}})])
def test_a_convolutional_teacher_in_half_precision_or_beside_it(write_experiment, images, tmp_path, dtype, changes):
    """Its weights are of one dtype with the images, and with the running statistics where it is sharded.

    The divergence is near that of both models in float32; bfloat16 has 8 bits.
    """
    torch.manual_seed(0)
    config = ResNetConfig(**{name: value for name, value in RESNET.items() if name != "model_type"}, num_channels=1,
                          id2label={0: "above", 1: "below"}, label2id={"above": 0, "below": 1})
    teacher = ResNetForImageClassification(config)
    teacher.classifier[1].weight.data *= 20  # so that it says something
    teacher.save_pretrained(tmp_path / "teacher")
    values = of_images(images)
    values["student"] = {"architecture": {
        "model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "patch_size": 4,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    file = write_experiment("run", **values, optimizer={"lr": 1e-9}, **changes,
                            teacher={"path": str(tmp_path / "teacher"), "dtype": dtype},
                            objective={"divergence": {"temperature": 1.0}},
                            training={**TRAINING, "steps": 1, "evaluate_every": 1, "checkpoint_every": 1})
    done = on_two_ranks("--config", str(file)) if changes else None
    assert done is None or done.returncode == 0, done.stderr[-2000:]
    assert changes or train_py("--config", str(file)).returncode == 0
    folder, rows = RunFolder(file.parent / "run"), prepare_text(read_experiment(file, []).experiment).train
    models = [AutoModelForImageClassification.from_pretrained(one).eval() for one in (folder.student,
                                                                                      tmp_path / "teacher")]
    order, taken = rows.order(0), TRAINING["batch_size"]
    with torch.no_grad():
        ours, theirs = (model(torch.stack([rows[order[at]]["pixel_values"] for at in range(taken)])).logits.log_softmax(
            -1) for model in models)
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert expected > 0.05 and read_lines(folder.metrics)[0]["forward_kl"] == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("changes", "said", "way_out"), [
    ({"training": {"batch_size": 8, "micro_batch": 1}}, "batch norms, which normalize by", "use 2 or more"),
    ({"sharding": {"engine": "fsdp2"}}, "running statistics fsdp2 does not", "use ddp"),
    ({"teacher": {"architecture": RESNET, "train": {"steps": 1}}, "objective": {"relations": {}}},
     "is a convolutional net", "objective.features"),
    ({"teacher": {"architecture": {"model_type": "vit", "patch_size": 4}, "train": {"steps": 1}},
      "objective": {"features": {}}}, "no positions in common", "leave it out"),
    ({"teacher": {"architecture": RESNET, "train": {"steps": 1}}, "objective": {"features": {}},
      "memory": {"budget": "1GiB"}}, "planned as one block", "memory.budget"),
    ({"student": {"architecture": RESNET, "quantization": {"bits": 4, "group_size": 8}}},
     "a scale for each output", "leave it out"),
    ({"student": {"architecture": RESNET, "quantization": {"bits": 8, "activations": {}}}}, "quantizes its activations",
     ""),
    ({"student": {"architecture": RESNET, "quantization": {"method": "rtn", "budget": "20KiB"}}}, "in a byte", "bits"),
    ({"student": {"architecture": RESNET, "quantization": {"bits": 8, "method": "gptq"}}}, "block by block",
     "method: rtn")])
def test_what_a_net_cannot_do_is_said_before_anything_is_trained(write_experiment, images, changes, said, way_out):
    values = {**of_images(images), **changes}
    with pytest.raises(UserError) as caught:
        check_early(read_experiment(write_experiment("wrong", **values), []).experiment, Topology())
    assert said in caught.value.problem and way_out in caught.value.way_out

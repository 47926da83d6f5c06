"""Whole runs of classifiers: trained, distilled, quantized, exported, reloaded and reported."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.conftest import on_two_ranks, train_py
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines

WORDS = {"animals": ["cat", "dog", "fox", "hen"], "colors": ["red", "blue", "green", "pink"],
         "numbers": ["one", "two", "three", "four"]}
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 32}
VIT = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
       "num_hidden_layers": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of three classes, told apart by their words; with a list of words and their classes beside them."""
    folder, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 24)):
        lines = []
        for number in range(count):
            label = list(WORDS)[number % 3]
            words = [str(draw.choice(WORDS[label])), "and", str(draw.choice(WORDS[label]))]
            lines.append(json.dumps({"text": " ".join(words), "label": label, "tokens": words,
                                     "tags": [label, "other", label]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of 8 x 8 pixels of two classes: bright above or below."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 16)):
        labels = np.arange(count) % 2
        pixels = draw.integers(0, 100, (count, 8, 8)).astype(np.uint8)
        for one, label in zip(pixels, labels, strict=True):
            one[4 * label:4 * label + 4] += 150
        np.savez(folder / f"{name}.npz", images=pixels, labels=labels)
    return folder


def of_texts(texts, **data):
    """What differs in an experiment on these texts."""
    return {"student": {"architecture": BERT}, "report": {"control": False},
            "data": {"task": "sequence_classification", "path": str(texts / "train.jsonl"), "sequence_length": 16,
                     "validation": {"path": str(texts / "test.jsonl"), "rows": 24}, **data}}


def steps_of(folder):
    return [line for line in read_lines(folder.metrics) if "loss" in line]


def held_out_of(folder):
    return [line["held_out"] for line in read_lines(folder.metrics) if "held_out" in line]


def test_a_text_classifier_is_distilled_into_few_bits_and_reloads_in_two_runtimes(run_experiment, texts):
    """The accuracy of the receipts is what plain transformers gets from the folder."""
    values = of_texts(texts)
    values["student"] = {"architecture": {**BERT, "num_hidden_layers": 1}, "quantization": {"bits": 4}}
    _, folder = run_experiment(
        "run", **values, teacher={"architecture": BERT, "train": {"steps": 30, "lr": 1e-2}}, optimizer={"lr": 1e-2},
        objective={"features": {"weight": 0.1}, "values": {"weight": 0.1}}, export={"to": ["onnx"]}, training={
            "steps": 30, "batch_size": 32, "micro_batch": 32, "evaluate_every": 15, "keep_best": "accuracy"})
    receipts = [json.loads((folder.path / name / "receipt.json").read_text()) for name in ("student", "student-onnx")]
    assert all(one["holds"] and one["rows"] == 24 and one["bits_per_byte"] is None for one in receipts)
    assert receipts[0]["accuracy"] == receipts[1]["accuracy"] > 0.6
    model = AutoModelForSequenceClassification.from_pretrained(folder.student).eval()
    assert model.config.id2label == dict(enumerate(WORDS))
    tokenizer = AutoTokenizer.from_pretrained(folder.student)
    right = []
    for line in (texts / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        with torch.no_grad():
            scores = model(**tokenizer(record["text"], return_tensors="pt")).logits[0]
        right.append(model.config.id2label[int(scores.argmax())] == record["label"])
    assert np.mean(right) == pytest.approx(receipts[0]["accuracy"])
    assert max(one["accuracy"] for one in held_out_of(folder)) == pytest.approx(receipts[0]["accuracy"])
    report = folder.report.read_text()
    assert "held-out rows (macro F1" in report and "confusion.png" in report and "Samples" not in report
    assert (folder.path / "confusion.png").exists()
    assert "text-classification" in (folder.student / "README.md").read_text()


def test_classes_of_words_and_rounding_after_training(run_experiment, texts, capsys):
    """Only the first token of a word has a class; the others count neither in the loss nor in the accuracy."""
    values = of_texts(texts, task="token_classification", label="tags")
    values["student"]["quantization"] = {"method": "gptq", "bits": 8, "calibration_rows": 32}
    _, folder = run_experiment("run", **values, optimizer={"lr": 1e-2}, export={"to": ["onnx"]},
                               training={"steps": 16, "evaluate_every": 16, "keep_best": "macro_f1"})
    (found,) = held_out_of(folder)
    assert f"held-out accuracy {found['accuracy']:.2%}; macro F1 {found['macro_f1']:.2%}\n" in capsys.readouterr().out
    receipt = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and receipt["rows"] == 3 * 24 and receipt["accuracy"] > 0.6
    assert json.loads((folder.path / "student-onnx" / "receipt.json").read_text())["accuracy"] == receipt["accuracy"]
    assert all(line["tokens"] == 3 * 8 for line in steps_of(folder))


def test_a_decoder_without_a_padding_token_classifies_as_student_and_as_teacher(run_experiment, texts, tmp_path):
    """Its rows are padded with the token that ends texts, and its class is that of the text alone, without padding."""
    words = [*(word for each in WORDS.values() for word in each), "and"]
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "<end>"])}, "and"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<end>").save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words) + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32)).save_pretrained(tmp_path / "lm")
    values = {**of_texts(texts, tokenizer={"train_vocabulary": None}), "optimizer": {"lr": 1e-2},
              "training": {"steps": 12, "batch_size": 24, "micro_batch": 12}}
    _, first = run_experiment("first", **{**values, "student": {"path": str(tmp_path / "lm"), "architecture": None}})
    assert json.loads((first.student / "config.json").read_text())["pad_token_id"] == len(words)
    published = shutil.copytree(first.student, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    _, second = run_experiment("second", **{**values, "student": {"path": str(tmp_path / "lm"), "architecture": None}},
                               teacher={"path": str(published)})
    figures = json.loads(second.comparison.read_text())
    for folder, accuracy in ((first.student, figures["teacher"]["accuracy"]),
                             (second.student, figures["student"]["accuracy"])):
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(
            folder)
        right = []
        for record in map(json.loads, (texts / "test.jsonl").read_text().splitlines()):
            with torch.no_grad():
                scores = model(torch.tensor([tokenizer(record["text"])["input_ids"]])).logits[0]
            right.append(model.config.id2label[int(scores.argmax())] == record["label"])
        assert np.mean(right) == pytest.approx(accuracy)
    assert figures["teacher"]["accuracy"] > 0.6


def test_a_classifier_of_images_is_interrupted_and_goes_on_to_the_bit(train_here, images):
    """With images that are mirrored and moved in each epoch anew."""
    values = {"student": {"architecture": VIT}, "report": {"control": False},
              "data": {"task": "image_classification", "path": str(images / "train.npz"),
                       "validation": {"path": str(images / "test.npz")}, "tokenizer": {"train_vocabulary": None},
                       "images": {"size": 8, "channels": 1, "flip": True, "shift": 1}}}
    training = {"steps": 12, "batch_size": 16, "micro_batch": 8, "evaluate_every": 6, "checkpoint_every": 5}
    train_here("cut", until=8, **values, training=training)
    again = train_here("cut", **values, training=training)
    whole = train_here("whole", **values, training=training)
    files = [one.folder.checkpoints / "step-00000012" / "model.safetensors" for one in (again, whole)]
    ours, theirs = map(load_file, files)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert [line["loss"] for line in steps_of(again.folder)] == [line["loss"] for line in steps_of(whole.folder)]
    rows = whole.text.train
    order = rows.order(0)
    epochs = [rows[order[len(rows) * epoch]] for epoch in range(6)] + [rows[3]]
    assert len({one["pixel_values"].numpy().tobytes() for one in epochs[:-1]}) > 2


def test_cached_scores_of_a_teacher_teach_what_it_teaches_itself(train_here, run_experiment, texts):
    """At a temperature that moves, too: scores are cached as they are, before any temperature."""
    values = of_texts(texts)
    _, teacher = run_experiment("teacher", **values, training={"steps": 2, "evaluate_every": 2})
    values["data"]["tokenizer"] = {"train_vocabulary": None, "path": str(teacher.student)}
    losses = []
    for source in ("live", "logits"):
        taught = train_here(source, **values, teacher={"path": str(teacher.student), "targets": {"source": source}},
                            objective={"divergence": {"temperature": [[0, 4.0], [1, 1.0]]}})
        losses.append([(line["loss"], line["forward_kl"]) for line in steps_of(taught.folder)])
    for live, cached in zip(*losses, strict=True):
        assert cached == pytest.approx(live, rel=1e-5)


def test_batches_and_budgets_change_no_loss(train_here, texts):
    """Micro-batches of another size, and blocks that are computed again to fit a budget that is kept."""
    values, training = of_texts(texts), {"steps": 4, "batch_size": 16, "evaluate_every": 4}
    whole = train_here("whole", **values, training={**training, "micro_batch": 16})
    parts = train_here("parts", **values, training={**training, "micro_batch": 4})
    budget = int(0.8 * whole.plan.memory.peak)
    fitted = train_here("fitted", **values, training={**training, "micro_batch": 16}, memory={"budget": budget})
    losses = [[line["loss"] for line in steps_of(one.folder)] for one in (whole, parts, fitted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    figures = [held_out_of(one.folder)[-1] for one in (whole, parts, fitted)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4) and figures[2] == pytest.approx(figures[0], rel=1e-4)
    assert fitted.plan.memory.peak <= budget and fitted.plan.memory.recomputed > 0
    measured = next(line["memory"]["peak"] for line in read_lines(fitted.folder.metrics) if "memory" in line)
    assert measured <= budget


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_and_measure_what_one_does(engine, write_experiment, texts):
    values = of_texts(texts)
    training = {"steps": 3, "batch_size": 8, "micro_batch": 4, "evaluate_every": 3}
    file = write_experiment("two", **values, training=training, sharding={"engine": engine})
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    two = RunFolder(file.parent / "two")
    file = write_experiment("one", **values, training=training)
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    one = RunFolder(file.parent / "one")
    assert [line["loss"] for line in steps_of(two)] == pytest.approx([line["loss"] for line in steps_of(one)], rel=1e-5)
    assert held_out_of(two)[-1] == pytest.approx(held_out_of(one)[-1], rel=1e-4)

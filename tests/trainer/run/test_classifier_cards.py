"""What a person meets of a finished classifier: its card, whose code runs, its report, its figures in sweeps."""

import contextlib
import io
import json

import numpy as np
import onnxruntime  # noqa: F401 - so that its import is not measured with a test
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

from strategies.export.hf.transformers_folder import write_folder
from strategies.export.onnx.onnx_folder import write_onnx
from tests.trainer.data.test_classified import BERT, pieces  # noqa: F401 - a fixture
from tests.trainer.run.test_sharing import code_of
from trainer.data.image_files import ImageProcessing
from trainer.experiment.task_nodes import Images
from trainer.run.classifier_snippets import Classified, classifier_snippet
from trainer.run.metrics import read_lines
from trainer.run.watch import Watch
from trainer.sweep.sweep_metrics import METRICS, figures

NAMES = ("no", "yes", "maybe")


def said(code):
    """What a piece of Python prints."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        exec(compile(code, "card", "exec"), {})
    return heard.getvalue()


@pytest.fixture
def draw():
    """Random weights, and names of classes for them."""
    torch.manual_seed(3)
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}


def written(folder, model, processor):
    """The model as a folder for each of the two runtimes."""
    write_folder(folder / "transformers", model, processor)
    write_onnx(folder / "onnx", model, processor)
    return [(runtime, folder / runtime) for runtime in ("transformers", "onnx")]


def test_code_for_words_prints_the_class_of_each(draw, pieces, tmp_path):  # noqa: F811
    config = BertConfig(**{name: value for name, value in BERT.items() if name != "model_type"}, vocab_size=10,
                        architectures=["BertForTokenClassification"], **draw)
    model, tokenizer = BertForTokenClassification(config).eval(), AutoTokenizer.from_pretrained(pieces)
    for weight in (model.classifier.weight, model.bert.embeddings.word_embeddings.weight):
        torch.nn.init.normal_(weight)  # so that words differ
    words = ["cat", "unaffable", "sat"]
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    numbers = model(**encoded).logits[0].argmax(-1).tolist()
    expected = [NAMES[numbers[at]] for at in (1, 2, 5)]  # [CLS] cat un ##aff ##able sat [SEP]
    assert len(set(expected)) > 1, "or a mistaken place would not show"
    for runtime, folder in written(tmp_path, model, tokenizer):
        language, code = classifier_snippet(runtime, str(folder), Classified("token_classification", length=16))
        answer = said(code.replace('["An", "example", "."]', repr(words)))
        assert language == "python" and answer.splitlines() == [
            f"{word} {name}" for word, name in zip(words, expected, strict=True)], code


def test_code_for_images_prints_the_class_of_a_file(draw, tmp_path):
    image = pytest.importorskip("PIL.Image")
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8,
                       patch_size=4, num_channels=3, initializer_range=1.0, **draw)
    model, settings = ViTForImageClassification(config).eval(), Images(size=8, mean=(0.4, 0.5, 0.6))
    model.config.architectures = ["ViTForImageClassification"]
    pixels = np.random.default_rng(5).integers(0, 256, (8, 8, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "own.png")
    values = (pixels.astype(np.float32) / 255 - np.float32([0.4, 0.5, 0.6])) / np.float32(0.5)
    expected = NAMES[int(model(pixel_values=torch.from_numpy(values.transpose(2, 0, 1))[None]).logits.argmax())]
    for runtime, folder in written(tmp_path, model, ImageProcessing(settings)):
        code = classifier_snippet(runtime, str(folder), Classified("image_classification", size=8))[1]
        assert said(code).strip() in NAMES
        code = code.replace('Image.new("RGB", (8, 8))', f"Image.open({str(tmp_path / 'own.png')!r})")
        assert said(code) == f"{expected}\n", code


def test_no_code_for_a_runtime_without_classifiers():
    assert classifier_snippet("gguf", ".", Classified("sequence_classification")) is None


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pairs of texts: yes where they are the same."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = np.random.default_rng(0)
    for name, count in (("rows", 64), ("held-out", 12)):
        words = draw.choice(["cat", "sat", "unaffable"], (count, 2))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(
            {"text": str(one), "other": str(two), "label": "yes" if one == two else "no"}) + "\n"
            for one, two in words))
    return folder


def test_a_run_on_pairs_of_texts_says_what_it_found(run_experiment, rows, pieces, monkeypatch):  # noqa: F811
    _, folder = run_experiment(
        "pairs", student={"architecture": BERT}, export={"to": ["onnx"]},
        data={"task": "sequence_classification", "path": str(rows / "rows.jsonl"), "text_pair": "other",
              "validation": {"path": str(rows / "held-out.jsonl"), "rows": 12, "fraction": 0.5}, "sequence_length": 12,
              "tokenizer": {"path": str(pieces), "train_vocabulary": None}},
        training={"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "keep_best": "macro_f1"})
    text = (folder.student / "README.md").read_text()
    card, receipt = ModelCard(text), json.loads(folder.receipt.read_text())
    assert card.data.pipeline_tag == "text-classification" and list(card.data.metrics) == ["accuracy", "f1"]
    assert "A classifier of texts of" in text and f"| accuracy on held-out rows | {receipt['accuracy']:.2%} |" in text
    assert "`rows.jsonl`, pairs of texts of at most 12 tokens, each with its class" in text
    assert "| answers compared | 12 |" in text and "4 steps of 8 rows" in text
    assert str(rows) not in text, "a card is public"

    monkeypatch.chdir(folder.student)
    ours, onnx = (code.replace('"One text.", "Another text."', '"cat", "unaffable"') for code in code_of(text))
    assert said(ours) in ("no\n", "yes\n") and said(onnx) == said(ours)

    report = folder.report.read_text()
    assert "4 steps, 32 rows," in report and "12 held-out rows" in report and "answers compared" in report
    assert "several documents each" not in report and (folder.path / "confusion.png").exists()
    lines = read_lines(folder.metrics)
    last = [line["held_out"] for line in lines if "held_out" in line][-1]
    assert all(line["rows"] == 8 and line["rows_per_second"] > 0 for line in lines if "loss" in line)
    for metric in (name for name, one in METRICS.items() if one.language is False):
        value = figures(folder, metric)[metric]
        assert value == (last[metric.removeprefix("held_out.")] if metric.startswith("held_out.") else
                         receipt[metric]), metric
    assert METRICS["held_out.macro_f1"].highest and not METRICS["calibration_error"].highest
    shown = "\n".join(Watch(folder.path).frame(200)[0])
    assert f"held-out accuracy {last['accuracy']:.2%}, best " in shown and " rows/s" in shown

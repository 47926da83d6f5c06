"""Whole runs with early exits: trained, exported with code of their own, reloaded, compared and reported."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import TINY, merge, on_two_ranks, train_py
from tests.strategies.pruning.early_exit.exit_models import code_of
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines

BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 3, "max_position_embeddings": 32}
WORDS = {"animals": ["cat", "dog", "fox"], "colors": ["red", "blue", "green"], "numbers": ["one", "two", "three"]}
LANGUAGE = {"student": {"architecture": {**TINY, "num_hidden_layers": 4}}, "report": {"control": False},
            "objective": {"early_exits": {"layers": [1, 2], "threshold": 0.25}}, "optimizer": {"lr": 1e-2},
            "training": {"steps": 30, "evaluate_every": 30, "checkpoint_every": 30}}


@pytest.fixture
def classified(tmp_path):
    """An experiment on texts of three classes, of which some are told by one word."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 24)):
        labels = [list(WORDS)[number % 3] for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(
            {"text": f"{draw.choice(WORDS[label])} and {draw.choice(WORDS[label])}", "label": label}) + "\n"
            for label in labels))
    return {"student": {"architecture": BERT}, "report": {"control": False}, "optimizer": {"lr": 1e-2},
            "objective": {"early_exits": {"layers": [0, 1], "threshold": 0.6}},
            "data": {"task": "sequence_classification", "path": str(tmp_path / "train.jsonl"), "sequence_length": 16,
                     "validation": {"path": str(tmp_path / "test.jsonl"), "rows": 24}},
            "training": {"steps": 30, "batch_size": 24, "micro_batch": 24, "evaluate_every": 30}}


def losses(folder):
    return [line["loss"] for line in read_lines(folder.metrics) if "loss" in line]


def test_a_classifier_leaves_rows_early_and_another_threshold_trains_nothing(run_experiment, classified):
    _, folder = run_experiment("run", **classified)
    exported = folder.path / "student-early-exit"
    receipt, about = (json.loads((exported / name).read_text()) for name in ("receipt.json", "exits.json"))
    assert receipt["holds"] and receipt["largest_difference"] <= 1e-5
    assert "24 of 24 held-out rows leave after the same block" in receipt["notes"][0]
    assert about["pooling"] == "first" and about["layers"] == [0, 1]
    curve = {one["threshold"]: one for one in about["curve"]}
    assert {0.0, 0.6, 1.0, 2.0} <= curve.keys()
    assert receipt["accuracy"] == pytest.approx(curve[0.6]["accuracy"])
    assert json.loads(folder.receipt.read_text())["accuracy"] == pytest.approx(curve[2.0]["accuracy"])
    assert curve[0.0]["blocks"] == pytest.approx(1 / 3) and curve[2.0]["blocks"] == 1
    assert 1 / 3 < curve[0.6]["blocks"] < 1, "some rows leave early"
    assert not any("early_exits" in name for name in load_file(folder.student / "model.safetensors"))
    report = folder.report.read_text()
    assert "## Early exits" in report and "| **0.6** |" in report and (folder.path / "early-exits.png").exists()
    assert "from early_exit import load" in (exported / "README.md").read_text()

    steps = folder.metrics.read_text()
    _, again = run_experiment("run", **merge(classified, {"objective": {"early_exits": {"threshold": 0.9}}}))
    assert again.metrics.read_text() == steps
    assert json.loads((exported / "exits.json").read_text())["threshold"] == 0.9
    assert load_file(exported / "exits.safetensors")["0.linear.weight"].shape == (3, 16)


def test_a_language_model_writes_with_fewer_blocks_and_resumes_to_the_bit(run_experiment, train_here):
    """A run that was cut off and goes on has the same exits and the same weights; its code reloads them."""
    whole = train_here("whole", **LANGUAGE)
    cut = merge(LANGUAGE, {"training": {"checkpoint_every": 10}})
    train_here("run", until=17, **cut)
    _, folder = run_experiment("run", **cut)
    assert losses(folder) == losses(whole.folder)
    exits = dict(whole.unwrapped.early_exits.state_dict())
    exported = folder.path / "student-early-exit"
    for name, tensor in load_file(exported / "exits.safetensors").items():
        assert torch.equal(tensor, exits[name])
    receipt, about = (json.loads((exported / name).read_text()) for name in ("receipt.json", "exits.json"))
    assert receipt["holds"] and receipt["largest_difference"] <= 1e-5 * receipt["largest_logit"]
    assert "48 of 48 tokens leave after the same block" in receipt["notes"][0]
    curve = {one["threshold"]: one for one in about["curve"]}
    assert curve[0.0]["blocks"] == 0.5 and 0.5 < curve[0.25]["blocks"] < 1 and curve[2.0]["flops"] == 1
    assert curve[2.0]["bits_per_byte"] == pytest.approx(json.loads(folder.receipt.read_text())["bits_per_byte"])
    lines = read_lines(whole.folder.metrics)
    assert all(line["early_exits"] > 0 for line in lines if "loss" in line)
    measured = next(line["memory"]["peak"] for line in lines if "memory" in line)
    assert 0.9 * whole.plan.memory.peak < measured <= whole.plan.memory.peak, "the exits are in the plan"
    model = code_of(exported).load(exported)
    plain = AutoModelForCausalLM.from_pretrained(folder.student)
    ids = torch.tensor([[40, 41, 42]])
    ours = model.generate(ids, 8, threshold=2.0).ids
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=8, do_sample=False)[0, 3:])
    assert min(model.generate(ids, 8, threshold=0.0).blocks[1:]) == 2


@pytest.mark.long
@pytest.mark.parametrize("language", [False, True], ids=["classifier", "language"])
def test_two_ranks_and_smaller_micro_batches_learn_the_same(write_experiment, classified, language):
    """The loss of exits is summed over all targets of a step, wherever they are."""
    values = merge(LANGUAGE if language else classified, {
        "training": {"steps": 6, "evaluate_every": 6, "batch_size": 24, "micro_batch": 4}})
    if not language:
        values["student"] = {"architecture": {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    done = on_two_ranks("--config", str(write_experiment("two", **values)))
    assert done.returncode == 0, done.stderr[-2000:]
    file = write_experiment("one", **merge(values, {"training": {"micro_batch": 24}}))
    assert train_py("--config", str(file)).returncode == 0
    two, one = (RunFolder(file.parent / name) for name in ("two", "one"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (load_file(folder.path / "student-early-exit" / "exits.safetensors") for folder in (two, one))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_rounded_students_leave_where_their_files_say(run_experiment):
    """After training, in 4 bits and in bfloat16: exits read the hidden states of what is exported."""
    short = merge(LANGUAGE, {"training": {"steps": 4, "evaluate_every": 4}, "objective": {
        "early_exits": {"threshold": 0.01}}})
    for name, changes in (("bits", {"student": {"quantization": {"method": "rtn", "bits": 4}}}),
                          ("half", {"export": {"dtype": "bfloat16"}})):
        _, folder = run_experiment(name, **merge(short, changes))
        receipt = json.loads((folder.path / "student-early-exit" / "receipt.json").read_text())
        assert receipt["holds"] and "48 of 48 tokens" in receipt["notes"][0]


@pytest.mark.long
def test_a_budget_is_kept_with_exits(run_experiment):
    """The measured peak of a planned step is within its budget, with the loss of two exits in it."""
    asked = merge(LANGUAGE, {"memory": {"budget": "6MiB"}, "training": {"steps": 4, "evaluate_every": 4}})
    _, folder = run_experiment("run", **asked)
    measured = next(line["memory"]["peak"] for line in read_lines(folder.metrics) if "memory" in line)
    assert measured <= json.loads(folder.plan.read_text())["memory"]["peak"] <= 6 * 2**20


@pytest.mark.long
def test_an_adapter_is_trained_with_exits_and_merged(run_experiment):
    """The base is frozen; exits, which begin anew, are trained beside the adapter."""
    small = merge(LANGUAGE, {"student": {"architecture": TINY}, "objective": {"early_exits": {"layers": [1]}},
                             "training": {"steps": 2, "evaluate_every": 2}})
    _, base = run_experiment("base", **{**small, "objective": {}})
    _, folder = run_experiment("run", **merge(small, {
        "student": {"path": str(base.student), "architecture": None, "adapter": {}},
        "data": {"tokenizer": {"train_vocabulary": None}}}))
    receipt = json.loads((folder.path / "student-early-exit" / "receipt.json").read_text())
    assert receipt["holds"] and "48 of 48 tokens" in receipt["notes"][0]
    norm = load_file(base.student / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(load_file(folder.path / "student-early-exit" / "exits.safetensors")["1.norm.weight"], norm)

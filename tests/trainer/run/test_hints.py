"""Hints say what would pay, and what they advise works and saves what they say."""

import json
import re

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from strategies.export.hf.transformers_folder import write_folder
from strategies.quantization.post_training import quantize
from trainer.experiment.quantization_nodes import Quantization
from trainer.run.folder import RunFolder
from trainer.run.hints import _about_size, _tensors, hints
from trainer.run.metrics import read_lines
from trainer.run.quantization_loss import rounding_cost
from trainer.run.report import write_report

ASKED = {"method": "rtn", "bits": 4, "group_size": 16}


def saving(hint, key):
    return int(re.search(rf"{re.escape(key)} \(saves (\d+)% of the file\)", hint)[1])


def bytes_of(folder):
    receipt = json.loads(folder.receipt.read_text())
    assert receipt["holds"]
    with (folder.student / "model.safetensors").open("rb") as file:  # its header, of names, is large in so small a file
        return receipt["bytes_on_disk"] - 8 - int.from_bytes(file.read(8), "little")


def test_what_hints_on_the_size_advise_saves_what_they_say(run_experiment, capsys):
    asked = {"student": {"quantization": ASKED}, "report": {"control": False}}
    _, folder = run_experiment(**asked)
    [hint] = [line for line in hints(folder) if "this file" in line]
    assert re.match(r"\d+% of this file are fp32 embeddings: student\.quantization\.embeddings: true", hint)
    assert hint.endswith("without another training") and hint in capsys.readouterr().out
    assert hint in folder.report.read_text()
    before, steps = bytes_of(folder), len(folder.metrics.read_text().splitlines())
    for key, change in {"student.quantization.embeddings: true": {"student": {"quantization": {**ASKED,
                                                                                               "embeddings": True}}},
                        "export.dtype: bfloat16": {**asked, "export": {"dtype": "bfloat16"}}}.items():
        _, folder = run_experiment(**{**asked, **change})
        assert 100 * (1 - bytes_of(folder) / before) == pytest.approx(saving(hint, key), abs=2), key
        assert not any("this file" in line and key in line for line in hints(folder))
    assert len(folder.metrics.read_text().splitlines()) == steps, "nothing is trained again"


def test_a_student_of_full_precision_is_told_of_both_ways(run_experiment):
    _, folder = run_experiment(report={"control": False})
    [hint] = hints(folder)
    before = bytes_of(folder)
    assert hint.startswith("100% of this file are fp32 weights: student.quantization: {method: rtn, bits: 8} (saves ")
    _, folder = run_experiment(report={"control": False}, student={"quantization": {"method": "rtn", "bits": 8}})
    assert 100 * (1 - bytes_of(folder) / before) == pytest.approx(saving(hint, "{method: rtn, bits: 8}"), abs=2)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    lines[0:0] = [{"step": 1, "held_out": {"bits_per_byte": 0.5, "cross_entropy": 1.0}}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = json.loads(folder.plan.read_text())
    folder.plan.write_text(json.dumps({**plan, "text": ["30 rows of 32 tokens, 41.5% full"]}))
    values = yaml.safe_load(folder.experiment.read_text())
    values["data"]["packing"] = False
    folder.experiment.write_text(yaml.safe_dump(values))
    found = hints(folder)
    assert any(line.startswith("held-out bits per byte were lowest at step 1 (0.5000, and ") for line in found)
    assert any("rows are 41.5% full: with data.packing: true" in line for line in found) and len(found) <= 3
    values["student"]["quantization"]["activations"] = {"kind": "int", "dynamic": True}
    values["training"]["keep_best"], values["data"]["packing"] = "bits_per_byte", True
    values["export"]["dtype"] = "bfloat16"
    folder.experiment.write_text(yaml.safe_dump(values))
    assert hints(folder) == [] and "Hints:" not in write_report(folder.path).read_text()


@pytest.mark.parametrize(("shape", "holds"), [
    (GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, vocab_size=300), False),
    (LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300,
                 tie_word_embeddings=True), True)])
def test_embeddings_are_advised_where_a_folder_can_hold_them(shape, holds, tmp_path):
    """GPT-2 stores matrices (inputs, outputs): beside such ones transformers would take embeddings for the same."""
    asked, tokenizer = Quantization(**ASKED), PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    batches, found = [{"input_ids": torch.arange(8)[None]}], {}
    for embeddings in (False, True):
        model = AutoModelForCausalLM.from_config(shape)
        quantize(model, batches, asked.build(torch.float32), method="rtn", embeddings=embeddings, ignore=("lm_head",))
        try:
            write_folder(tmp_path / str(embeddings), model, tokenizer)
            found[embeddings] = True
        except ValueError:
            found[embeddings] = False
    assert found == {False: True, True: holds}
    values = {"student": {"quantization": asked.model_dump(mode="json")}, "export": {"dtype": "float32"}}
    config = json.loads((tmp_path / "False" / "config.json").read_text())
    [hint] = _about_size(values, list(_tensors(tmp_path / "False")), config)
    assert ("embeddings: true" in hint) == holds and "export.dtype: bfloat16 (saves " in hint


def test_what_rounding_after_training_costs_is_said_wherever_the_student_is(run_experiment, capsys):
    asked, more = {"method": "rtn", "bits": 2}, {
        "report": {"control": False}, "optimizer": {"lr": 1e-2},
        "training": {"steps": 40, "evaluate_every": 40, "checkpoint_every": 40}}
    _, folder = run_experiment(student={"quantization": asked}, **more)
    before = [line["held_out"]["bits_per_byte"] for line in read_lines(folder.metrics) if "held_out" in line][-1]
    after = json.loads(folder.receipt.read_text())["bits_per_byte"]
    assert after > 1.03 * before, "two bits are too few"
    said = f"ounding to 2 bits cost {after - before:.4f} bits per byte ({before:.4f} before)"
    printed, card = capsys.readouterr().out, (folder.student / "README.md").read_text()
    assert f"tiny: r{said}\n" in printed
    assert f"R{said}." in folder.report.read_text() and f"R{said}." in card
    found = hints(folder)
    assert found[0] == (f"r{said}, {after / before - 1:.0%} more: student.quantization.method: gptq, without another "
                        "training, or method: qat, in a new run, may win back a part of it") and found[0] in printed
    assert "embeddings: true" not in " ".join(found), "rounding more is no advice"
    plan = json.loads(folder.plan.read_text())
    folder.plan.write_text(json.dumps({**plan, "text": ["1 rows of 32 tokens, 90.0% full"]}))
    assert "student.quantization.method: qat" in hints(folder)[0], "GPTQ would be refused: a layer has 64 inputs"
    folder.plan.write_text(json.dumps(plan))
    _, folder = run_experiment(student={"quantization": {**asked, "method": "gptq"}}, **more)
    assert "gptq" not in " ".join(hints(folder)), "that is done, and without another training"
    assert rounding_cost(folder).before == before and rounding_cost(folder).after < after


def test_of_the_best_evaluation_the_cost_is_counted_from_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.experiment.write_text(yaml.safe_dump({"student": {"quantization": {"method": "gptq", "kind": "int"}},
                                                 "export": {}}))
    folder.metrics.write_text("".join(json.dumps({"step": step, "held_out": {"bits_per_byte": bits}}) + "\n"
                                      for step, bits in ((1, 2.0), (2, 3.0))))
    assert rounding_cost(folder) is None
    folder.comparison.write_text(json.dumps({"student": {"bits_per_byte": 2.5}}))
    assert str(rounding_cost(folder)) == (
        "rounding to 4 bits cost nothing: it is 0.5000 bits per byte better (3.0000 before)")
    folder.comparison.write_text(json.dumps({"student": {"bits_per_byte": 2.99999}}))
    assert str(rounding_cost(folder)) == "rounding to 4 bits cost less than 0.0001 bits per byte (3.0000 before)"
    folder.comparison.write_text(json.dumps({"student": {"bits_per_byte": 2.5}}))
    folder.best.write_text(json.dumps({"step": 1}))
    assert str(rounding_cost(folder)) == "rounding to 4 bits cost 0.5000 bits per byte (2.0000 before)"

"""The student's files in whole runs: reloaded, compared, and written again later for other runtimes."""

import copy
import importlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from trainer import cli
from trainer.data.dataset import prepare_text
from trainer.errors import RunFailed, UserError
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_lines
from trainer.run.quantization_loss import rises
from trainer.student import export_student, write_student

ASKED = {"student": {"quantization": {"bits": 4, "group_size": 16, "scales": "learned",
                                      "layers": [{"match": "*.down_proj", "bits": 8, "group_size": 16}]}},
         "report": {"control": False}}


def test_a_finished_student_is_made_again_from_its_checkpoint(run_experiment):
    experiment, folder = run_experiment(**ASKED)
    receipt = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and receipt["largest_difference"] == 0
    again = export_student.rebuilt(experiment, folder, folder.student, prepare_text(experiment))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, AutoModelForCausalLM.from_pretrained(folder.student)(ids).logits)


def test_a_file_that_is_not_the_student_names_the_first_layer_that_differs(run_experiment, monkeypatch, tmp_path):
    def tampering(folder, *arguments):
        write(folder, *arguments)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for layer in (1, 2):
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight_scale"] *= 1.1
        save_file(tensors, file, metadata={"format": "pt"})

    write = write_student.write_folder
    monkeypatch.setattr(write_student, "write_folder", tampering)
    with pytest.raises(RunFailed, match=r"first layer that differs is model\.layers\.1\.self_attn\.o_proj, by 0\.\d+"):
        run_experiment(**ASKED)
    folder = RunFolder(tmp_path / "tiny")
    assert folder.unverified.exists() and not folder.student.exists() and not folder.finished


@pytest.mark.parametrize(("runtime", "dtype"), [("onnx", "float32"), ("gguf", "float16")])
def test_a_file_for_another_runtime_names_it_too(run_experiment, monkeypatch, tmp_path, runtime, dtype):
    module = importlib.import_module(f"strategies.export.{export_student.RUNTIMES[runtime].module}")
    write = getattr(module, f"write_{runtime}")

    def another(path, model, *arguments):
        model = copy.deepcopy(model)
        with torch.no_grad():
            for layer in (1, 2):
                model.model.layers[layer].self_attn.o_proj.weight.mul_(1.1)
        write(path, model, *arguments)

    monkeypatch.setattr(module, f"write_{runtime}", another)
    with pytest.raises(RunFailed, match=r"first layer that differs is model\.layers\.1\.self_attn\.o_proj, by 0\.\d+"):
        run_experiment(student={"quantization": {"bits": 8, "group_size": 32}}, report={"control": False},
                  export={"to": [runtime], "dtype": dtype})
    folder = RunFolder(tmp_path / "tiny")
    assert not folder.student_for(runtime).exists() and not folder.finished


@pytest.mark.parametrize("asked", [
    {"method": "rtn", "bits": 4, "scales": "mse", "activations": {"dynamic": False}},
    {"method": "gptq", "bits": 3, "group_size": 16, "symmetric": False, "smooth": 0.5},
])
def test_what_is_quantized_after_training_is_what_reloads(run_experiment, asked):
    experiment, folder = run_experiment(student={"quantization": asked}, report={"control": False})
    receipt = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and receipt["largest_difference"] == 0
    with (folder.student / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert receipt["bytes_on_disk"] == header + json.loads(folder.plan.read_text())["student_bytes"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        again = export_student.rebuilt(experiment, folder, folder.student, prepare_text(experiment))(ids).logits
        assert torch.equal(again, AutoModelForCausalLM.from_pretrained(folder.student)(ids).logits)


def test_bits_are_allotted_within_a_budget(run_experiment):
    asked = {"method": "rtn", "scales": "mse", "group_size": 16, "budget": 80_000}
    experiment, folder = run_experiment(student={"quantization": asked}, report={"control": False})
    found, receipt = json.loads(folder.allocation.read_text()), json.loads(folder.receipt.read_text())
    assert receipt["holds"] and receipt["largest_difference"] == 0
    tensors = found["rest"] + found["chosen"]["bytes"]
    assert tensors < receipt["bytes_on_disk"] <= tensors + found["header"] <= 80_000
    assert receipt["bytes_on_disk"] == sum(file.stat().st_size for file in folder.student.glob("*.safetensors"))
    held = prepare_text(experiment).held_out
    lines = [line for line in read_lines(folder.metrics) if "held_out" in line]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder.student)(
            **{name: held[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held["targets"].flatten(), reduction="sum")
    rise = float(nats) / math.log(2) / int(held["bytes"].sum()) - lines[-1]["held_out"]["bits_per_byte"]
    (_, alone, _), (_, nats, bits), (_, _, measured) = rises(folder)
    assert alone == found["chosen"]["rise"] and nats == found["together"] > 0
    assert measured == pytest.approx(rise, abs=1e-6) and f"| {measured:.3g} |" in folder.report.read_text()
    assert bits == pytest.approx(nats / math.log(2) * int((held["targets"] >= 0).sum()) / int(held["bytes"].sum()))
    assert len({quantizer["bits"] for quantizer in found["chosen"]["choice"].values()}) > 1
    assert folder.allocation.with_suffix(".png").stat().st_size > 1000
    assert "## Bits" in folder.report.read_text() and "within the budget of 80,000" in folder.report.read_text()
    for even in found["uniform"]:
        assert any(row["bytes"] <= even["bytes"] and row["rise"] <= even["rise"] for row in found["curve"])


def test_a_student_is_written_for_other_runtimes_and_later_again(run_experiment, capsys):
    asked = {"bits": 4, "group_size": 32, "scales": "learned"}
    export = {"to": ["onnx"], "dtype": "float16", "tolerance": 1e-3}
    _, folder = run_experiment(student={"quantization": asked}, export=export, report={"control": False})
    receipt = json.loads((folder.student_for("onnx") / "receipt.json").read_text())
    assert receipt["holds"] and receipt["argmax_agreement"] > 0.99 and "onnxruntime" in receipt["versions"]
    assert cli.limbeck(["export", str(folder.path), "--to", "gguf"]) == 0
    receipt = json.loads((folder.student_for("gguf") / "receipt.json").read_text())
    assert receipt["holds"] and receipt["largest_difference"] <= 1e-4 * receipt["largest_logit"]
    assert "`student-gguf/`" in folder.report.read_text() and "`student-onnx/`" in folder.report.read_text()


def test_what_a_runtime_cannot_hold_is_said_before_anything_starts(run_experiment, tmp_path):
    with pytest.raises(UserError, match="q_proj has 3 bits") as error:
        run_experiment(student={"quantization": {"bits": 3}}, export={"to": ["onnx"]})
    assert error.value.key == "export.to" and not (tmp_path / "tiny").exists()


MIXTURE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_a_mixture_of_experts_is_refused_for_onnx_before_anything_starts(
    run_experiment, write_experiment, tmp_path, capsys
):
    changes = {"student": {"architecture": MIXTURE}, "export": {"to": ["onnx"]}}
    with pytest.raises(UserError, match="holds a mixture of experts in one tensor") as error:
        run_experiment(**changes)
    assert error.value.key == "export.to" and not (tmp_path / "tiny").exists()
    assert cli.train(["--config", str(write_experiment(**changes)), "--dry-run"]) == 2
    assert "mixture of experts" in capsys.readouterr().err


def test_an_architecture_that_no_graph_is_made_of_is_refused_before_anything_starts(
    run_experiment, tmp_path, monkeypatch
):
    """Of those that nobody has tried, one of few layers is tried: this one looks at its data to choose what to do."""
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(x) if x.sum() > 0 else x)
    monkeypatch.setattr(export_student, "TRIED", ())
    with pytest.raises(UserError, match="torch makes no ONNX graph of LlamaForCausalLM: .+") as error:
        run_experiment(student={"architecture": {"intermediate_size": 32}}, export={"to": ["onnx"]})
    assert error.value.key == "export.to" and not (tmp_path / "tiny").exists()


def word_tokenizer(folder):
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<end>", "<unk>", "The", "cat"])},
                                      unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_before_training(run_experiment, tmp_path):
    with pytest.raises(UserError, match="a WordLevel that does not work on bytes") as error:
        run_experiment(export={"to": ["gguf"]}, data={"tokenizer": {
            "train_vocabulary": None, "path": word_tokenizer(tmp_path / "words")}})
    assert error.value.key == "export.to" and not (tmp_path / "tiny").exists()


def test_a_runtime_that_fails_leaves_the_student_for_transformers(run_experiment, monkeypatch, tmp_path):
    module = importlib.import_module("strategies.export.onnx.onnx_folder")
    monkeypatch.setattr(module, "write_onnx", lambda *_: [].pop())
    with pytest.raises(RunFailed, match="not written for onnx: IndexError: pop from empty list\n  -> for transformers"):
        run_experiment(export={"to": ["onnx"]}, report={"control": False})
    folder = RunFolder(tmp_path / "tiny")
    assert json.loads(folder.receipt.read_text())["holds"] and not folder.finished
    assert AutoModelForCausalLM.from_pretrained(folder.student).num_parameters() > 0


def test_export_of_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the folder of a finished run"):
        export_student.export(tmp_path, "onnx")
    with pytest.raises(UserError, match="no such runtime"):
        export_student.export(tmp_path, "onyx")

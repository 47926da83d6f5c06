"""Further runtimes that read what a run exported, each with a receipt."""

import json

import pytest

from strategies.export.readers import READERS, is_installed
from trainer import cli, command_line
from trainer.errors import UserError

needs_llama_cpp = pytest.mark.skipif(not is_installed("xllamacpp"), reason="pip install 'limbeck[llama-cpp]'")
SHORT = {"training": {"steps": 2}, "report": {"control": False}}


def test_readers_are_those_of_the_command_line():
    assert tuple(name for name, reader in READERS.items() if reader.of != name) == command_line.READERS


@pytest.mark.parametrize(("to", "says", "way_out"), [
    (["onnx"], "llama-cpp reads what is exported for gguf", "leave it out, or add gguf to export.to"),
    (["gguf"], r"pip install 'limbeck\[llama-cpp\]'", "install it, or leave it out")])
def test_a_reader_that_cannot_read_is_refused_before_anything_starts(run_experiment, tmp_path, monkeypatch, to, says,
                                                                     way_out):
    monkeypatch.setattr("strategies.export.readers.is_installed", lambda _: False)
    with pytest.raises(UserError, match=says) as error:
        run_experiment(export={"to": to, "readers": ["llama-cpp"]})
    assert (error.value.key, error.value.way_out) == ("export.readers", way_out) and not (tmp_path / "tiny").exists()


@needs_llama_cpp
def test_llama_cpp_reads_a_finished_run(run_experiment, capsys):
    export = {"to": ["gguf"], "dtype": "float16", "tolerance": 1e-3}
    _, folder = run_experiment(**SHORT, export=export)
    assert cli.limbeck(["export", str(folder.path), "--to", "gguf", "--reader", "llama-cpp"]) == 0
    assert "llama-cpp reads the same: largest difference of log-probabilities" in capsys.readouterr().out
    student = folder.student_for("gguf")
    receipt = json.loads((student / "receipt-llama-cpp.json").read_text())
    assert receipt["holds"] and 0 < receipt["slowest_turn"] < 1 and receipt["tokens"] > 32
    assert receipt["sha256"] == json.loads((student / "receipt.json").read_text())["sha256"]
    assert "- llama-cpp reads `student-gguf/` too: largest difference of log-probab" in folder.report.read_text()
    (student / "receipt-llama-cpp.json").unlink()
    _, folder = run_experiment(**SHORT, export={**export, "readers": ["llama-cpp"]})  # of a finished run: made again
    assert json.loads((student / "receipt-llama-cpp.json").read_text())["holds"]


@pytest.mark.skipif(not is_installed("ctranslate2"), reason="pip install 'limbeck[ctranslate2]'")
@pytest.mark.parametrize("quantization", [None, {"method": "rtn", "bits": 8}])
def test_a_run_is_written_for_ctranslate2(run_experiment, quantization):
    _, folder = run_experiment(**SHORT, student={"quantization": quantization}, export={"to": ["ctranslate2"]})
    student = folder.student_for("ctranslate2")
    receipt, other = (json.loads((student / f"{name}.json").read_text()) for name in ("receipt", "receipt-ctranslate2"))
    plain = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and other["holds"] and receipt["sha256"] == other["sha256"]
    assert receipt["parameters"] == plain["parameters"]
    assert receipt["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-5)
    assert receipt["bytes_on_disk"] == (student / "model.bin").stat().st_size


@pytest.mark.skipif(not is_installed("executorch"), reason="pip install 'limbeck[executorch]'")
def test_a_run_is_written_for_executorch(run_experiment):
    quantization = {"bits": 4, "group_size": 32, "positive_scales": True, "activations": {}}
    _, folder = run_experiment(**SHORT, student={
        "architecture": {"num_hidden_layers": 1}, "quantization": quantization}, export={
        "to": ["executorch"], "dtype": "bfloat16", "tolerance": 0.02})
    student = folder.student_for("executorch")
    receipt, other = (json.loads((student / f"{name}.json").read_text()) for name in ("receipt", "receipt-executorch"))
    plain = json.loads(folder.receipt.read_text())
    assert receipt["holds"] and other["holds"] and receipt["sha256"] == other["sha256"]
    assert receipt["parameters"] == plain["parameters"] and receipt["notes"][0].startswith("it takes texts of up to 64")
    assert receipt["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-2)
    assert receipt["bytes_on_disk"] == (student / "student.pte").stat().st_size


def test_executorch_that_cannot_hold_a_student_is_refused_before_training(run_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.export.executorch.executorch_folder.is_installed", lambda _: True)
    quantization = {"bits": 4, "group_size": 32, "activations": {}}
    with pytest.raises(UserError, match="scales of both signs") as error:
        run_experiment(student={"quantization": quantization}, export={"to": ["executorch"], "dtype": "bfloat16"})
    assert (error.value.key, error.value.way_out) == ("export.to", "leave it out, or quantize otherwise")
    monkeypatch.setattr("strategies.export.executorch.executorch_folder.is_installed", lambda _: False)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[executorch\]'"):
        run_experiment(export={"to": ["executorch"]})
    assert not (tmp_path / "tiny").exists()

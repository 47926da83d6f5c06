"""What acts after training alone may change on a trained run: the student is made again, and nothing trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.run.metrics import read_lines

ALLOTTED = {"student": {"quantization": {"method": "rtn", "group_size": 32, "budget": 55_000, "choices": [8, 4]}},
            "export": {"to": ["gguf"], "dtype": "float16"}, "report": {"control": False}}
FOUR = {"student": {"quantization": {"method": "rtn", "group_size": 16, "bits": 4}}, "export": {"dtype": "bfloat16"},
        "report": {"control": False, "prompt": "A"}}


def test_quantization_export_and_report_change_on_a_trained_run(run_experiment, capsys):
    _, folder = run_experiment("run", **ALLOTTED)
    lines = read_lines(folder.metrics)
    kept = {path: path.read_bytes() for path in folder.checkpoints.rglob("*") if path.is_file()}
    assert folder.allocation.exists() and "student-gguf" in folder.report.read_text()
    file = folder.student / "model.safetensors"
    chosen = json.loads(folder.allocation.read_text())["chosen"]["choice"].values()
    assert {quantizer["bits"] for quantizer in chosen} == {4, 8} and file.stat().st_size <= 55_000
    capsys.readouterr()
    run_experiment("run", **FOUR)
    out = " ".join(capsys.readouterr().out.split())
    assert "is trained; what export.dtype" in out and "quantization.bits" in out and "nothing is trained" in out
    assert "was of the student before, and is removed" in out and "--to gguf` writes it again" in out
    assert not folder.student_for("gguf").exists() and not folder.allocation.exists()
    assert not folder.allocation.with_suffix(".png").exists()
    assert "student-gguf" not in folder.report.read_text() and "## Bits" not in folder.report.read_text()
    assert read_lines(folder.metrics) == lines and {path: path.read_bytes() for path in kept} == kept
    found = load_file(file)
    assert {tensor.dtype for name, tensor in found.items() if name.endswith("scale")} == {torch.bfloat16}
    assert {tensor.shape[1] for name, tensor in found.items() if "o_proj.weight_packed" in name} == {32 * 4 // 32}
    assert json.loads(folder.receipt.read_text())["holds"] and "**prompt**: `A`" in folder.report.read_text()
    run_experiment("run", **FOUR)
    assert "is finished" in capsys.readouterr().out
    for change in ({"student": {"quantization": {"bits": 4}}}, {**FOUR, "optimizer": {"lr": 0.1}}):
        with pytest.raises(UserError, match="belongs to another experiment"):
            run_experiment("run", **change)


def test_rows_that_are_too_few_for_gptq_are_refused_before_training(run_experiment, tmp_path):
    def few(rows):
        return run_experiment("few", student={"quantization": {"method": "gptq", "calibration_rows": rows}},
                         data={"sequence_length": 16}, training={"steps": 1}, report={"control": False})

    with pytest.raises(UserError, match="GPTQ needs as many tokens") as refused:
        few(1)
    assert refused.value.key == "student.quantization.calibration_rows" and refused.value.value == 1
    assert not (tmp_path / "few" / "checkpoints").exists()
    few(int(refused.value.way_out.split("give ")[1].split()[0]))

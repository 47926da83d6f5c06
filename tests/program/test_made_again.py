"""What acts after training alone may change on a trained run: the student is made again, and nothing trained."""

import json

import torch
from safetensors.torch import load_file

from tests.conftest import train_py
from tests.program.test_bad_input import refused
from trainer.metrics import read_lines

ROUNDED = {"student": {"quantization": {"method": "rtn", "bits": 8}}}


def said(*arguments) -> str:
    done = train_py("--config", *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_quantization_export_and_report_change_on_a_trained_run(write_experiment, tmp_path):
    file, folder = write_experiment("run", **ROUNDED), tmp_path / "run"
    said(file)
    lines = read_lines(folder / "metrics.jsonl")
    kept = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    eight = (folder / "student" / "model.safetensors").stat().st_size
    out = said(file, "student.quantization.bits=4", "student.quantization.group_size=16", "report.prompt=A")
    assert "is trained; its student, receipts and report are made again" in out and "quantization.bits" in out
    assert read_lines(folder / "metrics.jsonl") == lines
    assert {path: path.read_bytes() for path in kept} == kept
    packed = load_file(folder / "student" / "model.safetensors")
    assert (folder / "student" / "model.safetensors").stat().st_size < eight
    assert packed["model.layers.0.mlp.up_proj.weight_scale"].shape[1] > 1  # groups, where there were channels
    receipt = json.loads((folder / "student" / "receipt.json").read_text())
    assert receipt["holds"] and "continues `A`" in (folder / "report.md").read_text()
    assert "is finished" in said(file, "student.quantization.bits=4", "student.quantization.group_size=16",
                                 "report.prompt=A")
    out = said(file, "student.quantization=null", "export.dtype=bfloat16", "report.prompt=A")
    plain = load_file(folder / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16} and read_lines(
        folder / "metrics.jsonl") == lines
    refused(file, tmp_path, "student.quantization={bits: 4}", parts=["belongs to another experiment"])
    refused(file, tmp_path, "optimizer.lr=0.1", parts=["belongs to another experiment"])


def test_rows_that_are_too_few_for_gptq_are_refused_before_training(write_experiment, tmp_path):
    file = write_experiment("few", student={"quantization": {"method": "gptq", "calibration_rows": 1}},
                            data={"sequence_length": 16})
    done = train_py("--config", str(file))
    assert done.returncode == 2 and "student.quantization.calibration_rows = 1" in done.stderr
    assert "GPTQ needs as many tokens" in done.stderr and not (tmp_path / "few" / "checkpoints").exists()
    wanted = done.stderr.split("give ")[1].split()[0]
    said(file, f"student.quantization.calibration_rows={wanted}")

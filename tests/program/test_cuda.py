"""The same promises on a GPU; skipped where there is none. `benchmarks/on_gpu.sh` runs these and every benchmark."""

import json

import pytest
import torch

from tests.conftest import TINY, train_py
from trainer.metrics import read_lines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_whole_run_on_the_gpu(write_experiment, tmp_path, precision):
    file = write_experiment(
        precision, teacher={"architecture": TINY, "train": {"steps": 4}}, precision={"dtype": precision},
        student={"architecture": None, "from_teacher": [0, 2], "quantization": {"bits": 4, "group_size": 16}},
        export={"tolerance": 1e-4})
    done = train_py("--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{precision}: 1 process(es) on cuda, {precision}" in done.stdout
    assert json.loads((tmp_path / precision / "student" / "receipt.json").read_text())["holds"]
    assert json.loads((tmp_path / precision / "plan.json").read_text())["measured"]["kind"] == "cuda"


def test_gpu_and_cpu_have_the_same_losses(train_here, monkeypatch):
    curves = {}
    for device, variable in (("cpu", "true"), ("cuda", "false")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
        trainer = train_here(device, training={"steps": 10})
        assert trainer.accelerator.device.type == device
        curves[device] = [line["loss"] for line in read_lines(trainer.folder.metrics) if "loss" in line]
    assert curves["cpu"] == pytest.approx(curves["cuda"], rel=1e-3)


def test_resume_on_the_gpu(train_here):
    changes = {"training": {"steps": 8, "checkpoint_every": 4}, "student": {"architecture": {"attention_dropout": 0.1}}}
    whole = train_here("whole", **changes)
    cut = train_here("cut", overrides=("training.steps=8",), **changes)
    first = cut.folder.checkpoints / "step-00000004"
    assert first.exists()
    import shutil

    shutil.rmtree(cut.folder.checkpoints / "step-00000008")
    again = train_here("cut", **changes)
    assert again.step == 8
    for one, two in zip(whole.unwrapped.parameters(), again.unwrapped.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)

"""The same promises on a GPU; skipped where there is none. `benchmarks/on_gpu.sh` runs these and every benchmark."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from tests.conftest import TINY, train_py
from trainer.run.metrics import read_lines

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
    assert json.loads((tmp_path / precision / "measured.json").read_text())["kind"] == "cuda"


def test_gpu_and_cpu_have_the_same_losses(train_here, monkeypatch):
    curves = {}
    for device, variable in (("cpu", "true"), ("cuda", "false")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
        trainer = train_here(device, training={"steps": 10})
        assert trainer.accelerator.device.type == device
        curves[device] = [line["loss"] for line in read_lines(trainer.folder.metrics) if "loss" in line]
    assert curves["cpu"] == pytest.approx(curves["cuda"], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_waits_for_the_gpu_twice(train_here, accumulation):
    """As `tests/trainer/training/test_waits.py` counts it without one; what transformers asks in a forward is apart."""
    trainer = train_here("waits", training={"steps": 4, "batch_size": 8, "micro_batch": 8 // accumulation})
    trainer.plan = replace(trainer.plan, steps=10)
    inputs = trainer.inputs()
    trainer.train_step(inputs)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = [str(one.filename) for one in waits if "called a synchronizing" in str(one.message)
            and "/transformers/" not in one.filename]
    assert len(ours) <= 2, ours


def test_resume_on_the_gpu(train_here):
    changes = {"training": {"steps": 8, "checkpoint_every": 4}, "student": {"architecture": {"attention_dropout": 0.1}}}
    whole = train_here("whole", **changes)
    cut = train_here("cut", overrides=("training.steps=8",), **changes)
    first = cut.folder.checkpoints / "step-00000004"
    assert first.exists()
    import shutil

    shutil.rmtree(cut.folder.checkpoints / "step-00000008")
    again = train_here("cut", **changes)
    assert again.state.step == 8
    for one, two in zip(whole.unwrapped.parameters(), again.unwrapped.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_budget_holds_on_the_allocators_peak(train_here, precision):
    settings = {"student": {"architecture": {**TINY, "num_hidden_layers": 6, "attention_dropout": 0.1}},
                "precision": {"dtype": precision}, "training": {"steps": 4, "batch_size": 32, "micro_batch": 32}}
    free = train_here("free", **settings)
    budget = int(0.85 * free.plan.memory.peak)
    fitted = train_here("fitted", memory={"budget": budget}, **settings)
    found = next(line["memory"] for line in read_lines(fitted.folder.metrics) if "memory" in line)
    assert found["peak"] <= budget and found["reserved"] >= found["peak"]
    losses = [[line["loss"] for line in read_lines(trainer.folder.metrics) if "loss" in line]
              for trainer in (free, fitted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("inductor", [False, True])
def test_rematerialized_gradients_on_the_gpu(inductor):
    from transformers import GPT2Config, GPT2LMHeadModel

    import limbeck

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=128, n_layer=6, n_head=4, n_positions=128)).cuda()
    ids = torch.randint(0, 512, (8, 128), device="cuda")
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    torch.cuda.reset_peak_memory_stats()
    gradients()
    peak = torch.cuda.max_memory_allocated()
    plan = limbeck.rematerialize(model, batch, budget=int(0.6 * peak), compile=inductor)
    planned = gradients()
    torch.cuda.reset_peak_memory_stats()
    gradients()
    assert torch.cuda.max_memory_allocated() <= plan.budget
    if not inductor:  # the kernels are the same, and so are dropout's draws
        for one, two in zip(plain, planned, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["fsdp2", "zero 1", "zero 2", "zero 3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_engines_on_one_gpu(write_experiment, tmp_path, engine, precision):
    """One rank: the engine's own path on CUDA, the same losses as without, and the peak that was foretold."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    name, _, stage = engine.partition(" ")
    architecture = {**TINY, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 2048,
                    "tie_word_embeddings": False}
    settings = {"student": {"architecture": architecture}, "precision": {"dtype": precision},
                "data": {"packing": False}, "optimizer": {"name": "lamb", "lr": 1e-2}, "training": {"steps": 8}}
    files = {run: write_experiment(run, **settings) for run in ("alone", "engine")}
    more = [f"sharding.engine={name}", *([f"sharding.stage={stage}"] if stage else [])]
    for run, overrides in (("alone", []), ("engine", more)):
        done = train_py("--config", str(files[run]), *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = {run: read_lines(tmp_path / run / "metrics.jsonl") for run in files}
    losses = {run: [line["loss"] for line in found if "loss" in line] for run, found in lines.items()}
    assert losses["engine"] == pytest.approx(losses["alone"], rel={"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}[precision])
    memory = next(line["memory"] for line in lines["engine"] if "memory" in line)
    plan = json.loads((tmp_path / "engine" / "plan.json").read_text())["memory"]
    assert plan["peak"] == pytest.approx(memory["peak"], rel=0.1)

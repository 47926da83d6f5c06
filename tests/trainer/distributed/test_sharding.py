"""The same training under every engine, on two real processes, against one process alone."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import TINY, forked, two_ranks
from trainer.run.metrics import read_lines

UNTIED = {**TINY, "tie_word_embeddings": False}
ENGINES = {"ddp": ["sharding.engine=ddp"], "fsdp2": ["sharding.engine=fsdp2"],
           **{f"zero{stage}": ["sharding.engine=zero", f"sharding.stage={stage}"] for stage in (1, 2, 3)}}
OPTIMIZERS = {"adamw": [], "lamb": ["optimizer.name=lamb", "optimizer.lr=5e-2"],
              "adafactor": ["optimizer.name=adafactor", "optimizer.lr=1e-1"]}
LOSS, WEIGHTS = 1e-5, 1e-5  # relative; of the largest weight. Found: below 4e-7


def on_ranks(runs: list[dict], folder: Path, timeout: int = 550, processes: int = 2, dies: bool = False
             ) -> dict[str, dict]:
    """Train experiments on ranks, one after another, and return what came of each; of those before one that `dies`."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    done = forked(_ranks, (folder / "runs.json",), two_ranks() if processes == 2 else [{"ACCELERATE_USE_CPU": "true"}],
                  timeout=timeout)
    ended = [run["name"] for run in (runs[:-1] if dies else runs)]
    assert (done.returncode != 0) == dies and all((folder / f"{name}.json").exists() for name in ended), (
        done.stdout + done.stderr)[-6000:]
    return {name: {**json.loads((folder / f"{name}.json").read_text()),
                   "weights": load_file(folder / f"{name}.safetensors")} for name in ended}


def _ranks(file: Path) -> None:
    from benchmarks.sharding import sharded_runs

    sharded_runs.main(file)


def relative(one, other) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def weights_apart(one, other) -> float:
    assert one.keys() == other.keys()
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    return max(float((one[name].flatten() - other[name].flatten()).abs().max()) for name in one) / largest


def digests_of_files(weights) -> dict[str, str]:
    """SHA-256 of dtype, shape and elements of each weight, as a checkpoint holds it, and of what llama has beside."""
    rotary = AutoModelForCausalLM.from_config(AutoConfig.for_model(**UNTIED, vocab_size=300)).model.rotary_emb
    shapes = {name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**UNTIED, vocab_size=300)).named_parameters()}
    every = {**{name: weights[name].view(shape) for name, shape in shapes.items()},
             **{f"model.rotary_emb.{name}": buffer for name, buffer in rotary.named_buffers()}}
    contents = {name: f"torch.float32 {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes()
                for name, tensor in every.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def alone(trainer) -> dict:
    """What came of a run in this process."""
    lines = [line for line in read_lines(trainer.folder.metrics) if "loss" in line]
    return {"loss": [line["loss"] for line in lines], "gradient_norm": [line["gradient_norm"] for line in lines],
            "weights": {name: parameter.detach().clone() for name, parameter in trainer.unwrapped.named_parameters()}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_engine_trains_as_one_process(write_experiment, train_here, tmp_path, optimizer):
    """20 steps at one global batch, on rows of different length: losses, gradient norms and weights."""
    settings = {"student": {"architecture": UNTIED}, "data": {"packing": False, "sequence_length": 64},
                "training": {"steps": 20, "micro_batch": 2, "evaluate_every": 20, "checkpoint_every": 20}}
    one = alone(train_here("alone", overrides=tuple(OPTIMIZERS[optimizer]), **settings))
    assert one["loss"][-1] < 0.9 * one["loss"][0]
    runs = [{"name": name, "file": str(write_experiment(name, **settings)), "overrides": [*how, *OPTIMIZERS[optimizer]]}
            for name, how in ENGINES.items()]
    for name, found in on_ranks(runs, tmp_path / "ranks").items():
        assert relative(one["loss"], found["loss"]) < LOSS, name
        assert relative(one["gradient_norm"], found["gradient_norm"]) < LOSS, name
        assert weights_apart(one["weights"], found["weights"]) < WEIGHTS, name
        wrapper, engine = {"ddp": ("DistributedDataParallel", "Engine"), "fsdp2": ("FSDPLlamaForCausalLM", "FSDP2")
                           }.get(name, ("DeepSpeedEngine", "Zero"))
        assert set(found["kinds"]) == {wrapper, engine}
        assert found["made again otherwise"] is None and found["digests"] == digests_of_files(found["weights"]), name

"""A run that is continued on other numbers of processes, under other engines, is the run that was never interrupted."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from tests.conftest import TINY, launch, train_py
from tests.program.test_sharding import ENGINES, on_ranks, relative, weights_apart
from trainer import checkpoints
from trainer.metrics import read_lines

UNTIED = {**TINY, "tie_word_embeddings": False}
SETTINGS = {"student": {"architecture": UNTIED}, "data": {"packing": False, "sequence_length": 64},
            "training": {"micro_batch": 2, "evaluate_every": 100, "checkpoint_every": 2, "steps": 8}}
OPTIMIZER = {"adamw": [], "lamb": ["optimizer.name=lamb", "optimizer.lr=5e-2"],
             "adafactor": ["optimizer.name=adafactor", "optimizer.lr=1e-1"]}
# Each run goes on under the next engine every two steps; the names are those of an optimizer and its way.
WAYS = {"adamw": ["fsdp2", "zero3", "zero1", "ddp"], "lamb": ["zero2", "fsdp2", "zero3", "zero2"],
        "adafactor": ["zero3", "zero1", "fsdp2", "zero2"]}


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def weights_of(folder):
    newest = checkpoints.latest(folder / "checkpoints")
    saved = checkpoints.Saved(newest, json.loads((newest / "state.json").read_text())["shapes"])
    return {name: saved.read("model", name, checkpoints.Piece(name, shape, 0, torch.Size(shape).numel()))
            for name, shape in saved.shapes.items()}


@pytest.mark.timeout(600)
def test_engines_hand_a_run_on_to_each_other(write_experiment, train_here, tmp_path):
    """FSDP2, ZeRO of any stage, DDP: weights, optimizer state and order of samples go over, for every optimizer."""
    runs = []
    for optimizer, way in WAYS.items():
        file = write_experiment(optimizer, **SETTINGS)
        runs += [{"name": f"{optimizer}-{number}", "file": str(file), "until": 2 * (number + 1),
                  "overrides": [*ENGINES[engine], *OPTIMIZER[optimizer]]} for number, engine in enumerate(way)]
    on_ranks(runs, tmp_path / "ranks")
    for optimizer, overrides in OPTIMIZER.items():
        one = train_here(f"alone-{optimizer}", overrides=tuple(overrides), **SETTINGS)
        assert relative(losses(one.folder.path), losses(tmp_path / optimizer)) < 1e-5, optimizer
        theirs = weights_of(tmp_path / optimizer)
        ours = {name: parameter.detach() for name, parameter in one.unwrapped.named_parameters()}
        assert weights_apart({name: tensor.flatten() for name, tensor in ours.items()}, theirs) < 1e-5, optimizer


@pytest.mark.timeout(600)
def test_two_processes_one_and_two_again(write_experiment, train_here, tmp_path):
    """2 -> 1 -> 2, in three launches, for an engine that shards and one that does not on the single process."""
    way = [(2, "fsdp2"), (1, "none"), (2, "zero3")]
    file = write_experiment("there", **{**SETTINGS, "training": {**SETTINGS["training"], "steps": 6}})
    for number, (processes, engine) in enumerate(way):
        until = 2 * (number + 1)
        if processes == 2:
            on_ranks([{"name": f"there-{number}", "file": str(file), "until": until, "overrides": ENGINES[engine]}],
                     tmp_path / f"ranks{number}")
        else:
            done = train_py("--config", str(file), "report.control=false")
            assert done.returncode == 0, done.stderr[-2000:]  # to the end: its checkpoints at 4 and 6 are there
            _go_back(tmp_path / "there")
    one = train_here("alone", **{**SETTINGS, "training": {**SETTINGS["training"], "steps": 6}})
    assert relative(losses(one.folder.path), losses(tmp_path / "there")) < 1e-5


def _go_back(folder) -> None:
    """As if a run had been ended after step 4: its last checkpoint, student and report are not there yet."""
    for path in (folder / "checkpoints" / "step-00000006", folder / "student"):
        shutil.rmtree(path)
    for name in ("report.md", "comparison.json"):
        (folder / name).unlink()


def test_files_of_a_sharded_checkpoint(write_experiment, tmp_path):
    """fp32 parts that make up each weight once; a process writes what it holds; other models are refused."""
    file = write_experiment("parts", **SETTINGS)
    on_ranks([{"name": "parts", "file": str(file), "overrides": ENGINES["zero3"], "until": 2}], tmp_path / "ranks")
    newest = checkpoints.latest(tmp_path / "parts" / "checkpoints")
    names = {path.name for path in newest.iterdir()}
    assert names == {"state.json", "random-0.safetensors", "random-1.safetensors",
                     *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (0, 1))}
    shapes = json.loads((newest / "state.json").read_text())["shapes"]
    held = dict.fromkeys(shapes, 0)
    for path in newest.glob("model-*"):
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(key)
                assert tensor.dtype == torch.float32 and tensor.ndim == 1
                held[key.partition("@")[0]] += tensor.numel()
    assert held == {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    saved = checkpoints.Saved(newest, shapes)
    with pytest.raises(ValueError, match="another model"):
        saved.read("model", "no.such.weight", checkpoints.Piece("no.such.weight", (2,), 0, 2))
    with pytest.raises(ValueError, match="another model"):
        saved.read("model", "model.norm.weight", checkpoints.Piece("model.norm.weight", (7,), 0, 7))
    (newest / "model-00001-of-00002.safetensors").unlink()
    part = checkpoints.Piece("model.norm.weight", (32,), 0, 32)
    with pytest.raises(ValueError, match="lacks a part"):
        checkpoints.Saved(newest, shapes).read("model", "model.norm.weight", part)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_student_of_a_sharded_run_is_real(write_experiment, tmp_path, engine):
    """A sharded teacher, a 4-bit student: it consolidates, reloads in a fresh process, and the receipt holds."""
    file = write_experiment(
        engine, student={"architecture": UNTIED, "quantization": {"bits": 4, "group_size": 16}},
        teacher={"architecture": TINY, "dtype": "bfloat16" if engine == "zero3" else "float32", "train": {"steps": 3}},
        training={"steps": 4, "micro_batch": 2}, report={"control": False})
    done = launch("--config", str(file), *ENGINES[engine], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((tmp_path / engine / "student" / "receipt.json").read_text())
    assert receipt["holds"] and receipt["largest_difference"] <= receipt["tolerance"] * receipt["largest_logit"]
    assert "FutureWarning" not in done.stderr

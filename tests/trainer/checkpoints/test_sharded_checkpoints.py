"""A run that is continued on other numbers of processes, under other engines, is the run that was never interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import TINY, launch, on_two_ranks
from tests.trainer.distributed.test_sharding import ENGINES, OPTIMIZERS, on_ranks, relative, weights_apart
from trainer import checkpoints
from trainer.checkpoints.manifest import sealed
from trainer.errors import RunFailed
from trainer.run.metrics import read_lines

UNTIED = {**TINY, "tie_word_embeddings": False}
SETTINGS = {"student": {"architecture": UNTIED}, "data": {"packing": False, "sequence_length": 64},
            "training": {"micro_batch": 2, "evaluate_every": 100, "checkpoint_every": 2, "steps": 8}}
DROPPING = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout": 0.2, "attention_dropout": 0.2}
# Every two steps a run goes on under the next engine, the third time on one process instead of two.
WAYS = {"adamw": ["fsdp2", "zero3", "none", "zero1"], "lamb": ["zero2", "zero1", "fsdp2", "zero3"],
        "adafactor": ["zero1", "fsdp2", "zero3", "ddp"]}
LOSS, WEIGHTS, STATE = 1e-5, 1e-5, 1e-4  # relative; of the largest weight; of a tensor's largest


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def tensors_of(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state of a checkpoint, each tensor whole and flat, whatever wrote it."""
    saved = checkpoints.Saved(checkpoint, json.loads((checkpoint / "state.json").read_text())["shapes"])
    pieces = {name: checkpoints.Piece(name, shape, 0, torch.Size(shape).numel())
              for name, shape in saved.shapes.items()}
    state = {name: saved.moments(piece) for name, piece in pieces.items()}
    return {"model": {name: saved.read("model", name, piece) for name, piece in pieces.items()},
            "optimizer": {f"{name}/{what}": value.flatten() for name, own in state.items()
                          for what, value in {**own.elementwise, **own.whole}.items()}}


def newest(folder: Path) -> Path:
    return checkpoints.latest(folder / "checkpoints")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference in a tensor, as a share of its largest element."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp_min(1e-30)) for name in one)


@pytest.mark.timeout(600)
def test_engines_and_numbers_of_processes_hand_a_run_on(write_experiment, train_here, tmp_path):
    """2 -> 1 -> 2 processes, FSDP2, ZeRO of any stage, DDP, none: weights, optimizer state and rows are kept."""
    files = {optimizer: str(write_experiment(optimizer, **SETTINGS)) for optimizer in WAYS}
    rows: dict[str, list] = {optimizer: [] for optimizer in WAYS}
    for parts, processes in (((0, 1), 2), ((2,), 1), ((3,), 2)):
        runs = [{"name": f"{optimizer}-{part}", "file": files[optimizer], "until": 2 * (part + 1),
                 "overrides": [*ENGINES.get(way[part], ["sharding.engine=none"]), *OPTIMIZERS[optimizer]]}
                for optimizer, way in WAYS.items() for part in parts]
        found = on_ranks(runs, tmp_path / f"ranks{parts[0]}", processes=processes)
        for optimizer in WAYS:
            rows[optimizer] += sum((found[f"{optimizer}-{part}"]["rows"] for part in parts), [])
    for optimizer, overrides in OPTIMIZERS.items():
        one = train_here(f"alone-{optimizer}", overrides=tuple(overrides), **SETTINGS)
        assert relative(losses(one.folder.path), losses(tmp_path / optimizer)) < LOSS, optimizer
        ours, theirs = tensors_of(newest(one.folder.path)), tensors_of(newest(tmp_path / optimizer))
        assert weights_apart(ours["model"], theirs["model"]) < WEIGHTS, optimizer
        assert ours["optimizer"] and apart(ours["optimizer"], theirs["optimizer"]) < STATE, optimizer
        assert rows[optimizer] == rows_of(one), optimizer


def rows_of(trainer) -> list[list[int]]:
    """Rows of every step of a run on one process, sorted in each."""
    done, trainer.state.step, trainer.state.rows = trainer.state.step, 0, 0
    batches = trainer._batches()
    rows = [sorted(sum((next(batches)["row"].tolist() for _ in range(trainer.plan.accumulation)), []))
            for _ in range(trainer.steps)]
    trainer.state.step = done
    return rows


@pytest.mark.timeout(600)
def test_interrupted_runs_end_where_undisturbed_ones_do_to_the_last_bit(write_experiment, tmp_path):
    """With dropout, which each process draws for itself: ended and begun again (in fp16), and killed by kill -9.

    A process that is killed alone takes the other with it, and nobody waits for ever.
    """
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 6}}

    def run(engine: str, folder: str, part: str = "", **how) -> dict:
        half = ["precision.dtype=fp16", "precision.loss_scale.initial=1048576", "precision.loss_scale.growth_interval=2"
                ] if engine in ("ddp", "zero3") else []
        return {"name": f"{engine}-{folder}{part}", "file": str(write_experiment(f"{engine}-{folder}", **settings)),
                "overrides": [*ENGINES[engine], f"student.architecture={json.dumps(DROPPING)}", *half,
                              f"training.background_saves={str(folder != 'killed').lower()}"],  # kept before the kill
                "fp16": bool(half), **how}

    first = []  # DeepSpeed changes torch's linear layers for the rest of a process: what is without it comes first
    for engine in ("ddp", "zero3"):
        first += [run(engine, "whole"), run(engine, "parts", "-a", until=2), run(engine, "parts", "-b", until=6)]
    first[3:3] = [run(engine, "whole") for engine in ("fsdp2", "zero2")]
    on_ranks([*first, run("fsdp2", "killed", kill=[5, [0, 1]])], tmp_path / "first", dies=True)
    assert newest(tmp_path / "fsdp2-killed").name == "step-00000004"
    on_ranks([run("fsdp2", "killed", "-again"), run("zero2", "killed", kill=[5, [1]])], tmp_path / "second", dies=True)
    assert newest(tmp_path / "zero2-killed").name == "step-00000004"
    on_ranks([run("zero2", "killed", "-again")], tmp_path / "third")
    for engine, how in (("ddp", "parts"), ("zero3", "parts"), ("fsdp2", "killed"), ("zero2", "killed")):
        whole, other = tmp_path / f"{engine}-whole", tmp_path / f"{engine}-{how}"
        assert losses(whole) == losses(other) and len(losses(whole)) == 6, engine
        same_to_the_last_bit(newest(whole), newest(other))
        draws = [load_file(newest(whole) / f"random-{rank}.safetensors")["cpu"] for rank in (0, 1)]
        assert not torch.equal(*draws), "each process draws for itself"


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_to_the_last_bit(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"state.json"}:
        assert same_tensors(load_file(one / name), load_file(other / name)), name
    assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())


@pytest.mark.timeout(600)
def test_files_of_a_sharded_checkpoint(write_experiment, tmp_path):
    """fp32 parts that make up each weight once; a process writes what it holds, and what all hold is written once."""
    file = str(write_experiment("parts", **SETTINGS))
    runs = [{"name": engine, "file": file, "overrides": [*ENGINES[engine], f"run.folder={tmp_path / engine}"],
             "until": 2} for engine in ("zero3", "fsdp2", "ddp")]
    runs[1]["overrides"] = [*runs[1]["overrides"], "precision.dtype=bf16"]
    on_ranks(runs, tmp_path / "ranks")
    for engine in ("zero3", "fsdp2", "ddp"):
        folder = newest(tmp_path / engine)
        parts = {f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)}
        files = {"model.safetensors", "optimizer.safetensors"} if engine == "ddp" else parts
        assert {path.name for path in folder.iterdir()} == {"state.json", "random-0.safetensors",
                                                            "random-1.safetensors", *files}
        shapes = json.loads((folder / "state.json").read_text())["shapes"]
        held = dict.fromkeys(shapes, 0)
        for path in folder.glob("model*"):
            with safe_open(path, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    tensor = handle.get_tensor(key)
                    assert tensor.dtype == torch.float32 and (tensor.ndim == 1 or engine == "ddp")
                    held[key.partition("@")[0]] += tensor.numel()
        assert held == {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        saved = checkpoints.Saved(folder, shapes)
        for piece in (checkpoints.Piece("no.such.weight", (2,), 0, 2),
                      checkpoints.Piece("model.norm.weight", (7,), 0, 7)):
            with pytest.raises(checkpoints.Unreadable, match="another model"):
                saved.read("model", piece.name, piece)
    refused_by_both(file, tmp_path / "zero3")


def refused_by_both(file: str, folder: Path) -> None:
    """A file that one process alone reads is damaged: both end with one message, and neither waits for the other."""
    random = newest(folder) / "random-1.safetensors"
    random.write_bytes(b"\xff" * random.stat().st_size)
    done = on_two_ranks("--config", file, f"run.folder={folder}", *ENGINES["zero3"], timeout=100)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert "none is as it was written:\n  step-00000002: random-1.safetensors is not as it was written" in done.stderr
    assert "move that folder away" in done.stderr and "begins anew" in done.stderr


def test_a_checkpoint_of_another_model_is_said(train_here):
    """It is as it was written, so no run goes back to an older one by itself; there is a way to ask for that."""
    changes = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 4}}
    folder = train_here("other", **changes).folder
    manifest = newest(folder.path) / "state.json"
    state = json.loads(manifest.read_text())
    del state["sha256"]
    state["shapes"]["model.norm.weight"] = [64]
    manifest.write_text(sealed(state))
    with pytest.raises(RunFailed) as caught:
        train_here("other", **changes)
    said = str(caught.value)
    assert "it is of another model: model.norm.weight has shape (32,), and there it has" in said
    assert f"the checkpoint {newest(folder.path)} cannot be gone on from" in said
    assert "goes on from step-00000002, the checkpoint before it" in said
    shutil.rmtree(newest(folder.path))
    assert train_here("other", **changes).state.step == 4 and len(losses(folder.path)) == 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_student_of_a_sharded_run_is_real(write_experiment, tmp_path, engine):
    """A sharded teacher, a 4-bit student: it consolidates, reloads in a fresh process, and the receipt holds.

    Scales that are searched for once are parameters that nothing trains: of those DeepSpeed has no fp32 ones.
    """
    scales, precision = ("mse", "bf16") if engine == "zero3" else ("minmax", "fp32")
    file = write_experiment(
        engine, student={"architecture": UNTIED, "quantization": {"bits": 4, "group_size": 16, "scales": scales}},
        precision={"dtype": precision},
        teacher={"architecture": TINY, "dtype": "bfloat16" if engine == "zero3" else "float32", "train": {"steps": 3}},
        training={"steps": 4, "micro_batch": 2}, report={"control": False})
    arguments = ("--config", str(file), *ENGINES[engine])
    done = launch(*arguments, processes=2) if engine == "zero3" else on_two_ranks(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((tmp_path / engine / "student" / "receipt.json").read_text())
    assert receipt["holds"] and receipt["largest_difference"] <= receipt["tolerance"] * receipt["largest_logit"]
    assert "FutureWarning" not in done.stderr

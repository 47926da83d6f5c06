"""Checkpoints that cannot be lost: how they are committed, which one a run goes on from, and what a full disk does."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from strategies.sharding.engine import Engine
from tests.conftest import FORKED, TINY, train_py
from trainer import checkpoints
from trainer.checkpoints.manifest import sealed
from trainer.data.batches import training_batches
from trainer.errors import RunFailed
from trainer.run.metrics import Metrics, read_lines

DROPPING = {**TINY, "attention_dropout": 0.2}
SETTINGS = {"student": {"architecture": TINY},
            "training": {"steps": 6, "micro_batch": 4, "evaluate_every": 100, "checkpoint_every": 2}}


def small() -> tuple[nn.Module, Engine]:
    """A student with buffers of every width, and its engine, one step in."""
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    for name, buffer in {"flags": torch.tensor([True, False, True]), "halves": torch.arange(3).bfloat16(),
                         "wide": torch.arange(5, dtype=torch.float64), "none": torch.empty(0, 7), "one": torch.ones(()),
                         "byte": torch.tensor([7], dtype=torch.uint8)}.items():
        student.register_buffer(name, buffer)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    return student, Engine(student, student, optimizer)


def store(folder: Path, said: list[str], **changes) -> checkpoints.Checkpoints:
    options = {"rank": 0, "ranks": 1, "gather": list, "background": True, "say": said.append, **changes}
    return checkpoints.Checkpoints(folder, 2, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def same(one: Path, other: Path) -> None:
    """Two checkpoints are the same to the last byte; names and hashes are in the manifest."""
    assert names(one) == names(other)
    for name in names(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# ---- what is written

def test_every_file_is_hashed_and_nothing_else_is_left(tmp_path):
    """Foreground and background write the same; older ones than `keep` go; the files are those of the format."""
    student, engine = small()
    for background in (True, False):
        torch.manual_seed(2), random.seed(2), np.random.seed(2)
        saving = store(tmp_path / str(background), said := [], background=background)
        for step in (2, 4, 6):
            saving.save(step, engine, {"precision": {"loss_scale": 2.0}})
        saving.finish()
        assert names(saving.folder) == ["step-00000004", "step-00000006"] and said == []
        assert saving.last == checkpoints.latest(saving.folder) == saving.folder / "step-00000006"
    one, other = tmp_path / "True" / "step-00000006", tmp_path / "False" / "step-00000006"
    same(one, other)
    manifest = json.loads((one / "state.json").read_text())
    assert names(one) == sorted([*manifest["files"], "state.json"])
    for name, entry in manifest["files"].items():
        data = (one / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    saved = load_file(one / "model.safetensors")
    assert saved.keys() == student.state_dict().keys()
    for name, tensor in student.state_dict().items():
        assert torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype, name


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Calls to the system in their order: what a loss of power leaves at any of them can be gone on from."""
    _, engine = small()
    saving = store(tmp_path / "checkpoints", [], background=False)
    for step in (2, 4):
        saving.save(step, engine, {})
    done: list[tuple[str, str]] = []
    plain = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(
        ("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name)), plain["fsync"](handle)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda old, new, name=name: (done.append(("name", Path(new).name)),
                                                                   plain[name](old, new)))
    from trainer.checkpoints import commit

    remove = commit.remove
    monkeypatch.setattr(commit, "remove", lambda old: (done.append(("remove", old.name)), remove(old)))
    saving.save(6, engine, {})
    files = sorted(done[:3])
    assert files == [("sync", f"{name}.safetensors") for name in ("model", "optimizer", "random-0")]
    partial = next(name for what, name in done if what == "sync" and name.startswith(".step-"))
    assert done[3:] == [("sync", ".state.json.partial"), ("name", "state.json"), ("sync", partial),
                        ("sync", tmp_path.name), ("name", "step-00000006"), ("sync", "checkpoints"),
                        ("remove", "step-00000002"), ("name", ".step-00000002.removed")]


def test_a_step_that_is_saved_is_not_put_at_risk_again(tmp_path):
    _, engine = small()
    saving = store(tmp_path, [])
    saving.save(2, engine, {})
    saving.finish()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    saving.save(2, engine, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_links_are_removed_and_what_they_lead_to_is_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001").symlink_to(outside)
    _, engine = small()
    saving = store(folder, [])
    for step in (2, 3):
        saving.save(step, engine, {})
    saving.finish()
    assert names(folder) == ["step-00000002", "step-00000003"] and names(outside) == ["thesis.tex"]


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(np.random.rand()),
            float(torch.rand(())), float(torch.randn(()))]


def test_all_random_numbers_go_on(tmp_path):
    """A student may draw from torch, Python or numpy; a normal number that a generator has in hand is not lost."""
    _, engine = small()
    saving = store(tmp_path, [])
    for step in (1, 2):
        draws()  # the second time numpy's and Python's pairs of normals are used up
        saving.save(step, engine, {})
        saving.finish()
        coming = draws() + draws()
        checkpoints.load(checkpoints.latest(tmp_path), engine, rank=0)
        assert draws() + draws() == coming


def test_rows_come_in_one_order_on_any_number_of_processes(train_here):
    """Position by position, whatever step a run goes on from, and however the batch is split."""
    text = train_here("order", until=0, **SETTINGS).text

    def rows(processes: int, micro_batch: int, step: int) -> list[int]:
        streams = [training_batches(text.train, seed=3, micro_batch=micro_batch, replica=rank, replicas=processes,
                                    skip=8 * step, workers=0, pin=False) for rank in range(processes)]
        return [row for _ in range(8 * (12 - step) // (micro_batch * processes)) for stream in streams
                for row in next(stream)["row"].tolist()]

    whole = rows(1, 8, 0)
    assert len(whole) == 96 and len(whole) > len(text.train), "more than an epoch"
    for processes, micro_batch, step in ((1, 2, 5), (2, 4, 5), (2, 2, 7), (4, 1, 3), (8, 1, 11)):
        assert rows(processes, micro_batch, step) == whole[8 * step:]


def test_killed_while_it_saves_a_run_ends_where_an_undisturbed_one_does(write_experiment, train_here, capsys, tmp_path):
    """kill -9 at moments within saves, again and again, with dropout: weights, moments, draws and losses to the bit."""
    changes = {"student": {"architecture": DROPPING},
               "training": {"steps": 24, "micro_batch": 4, "evaluate_every": 24, "checkpoint_every": 1}}
    train_here("whole", **changes)
    cut = str(write_experiment("cut", **changes))
    folder, seen = tmp_path / "cut" / "checkpoints", []
    for kill in range(3):
        process = FORKED.Process(target=quietly, args=(["--config", cut], tmp_path / "said"))
        process.start()
        before = checkpoints.latest(folder)
        while checkpoints.latest(folder) == before and process.is_alive():
            time.sleep(0.001)
        while not list(folder.glob(".step-*")) and process.is_alive():
            time.sleep(0.0001)
        time.sleep(0.004 * kill)
        process.kill()
        process.join()
        seen.append((process.exitcode, checkpoints.latest(folder)))
        assert checkpoints.latest(folder) is not None and checkpoints.wrong_with(checkpoints.latest(folder)) is None
    assert all(code == -signal.SIGKILL for code, _ in seen), seen
    train_here("cut", **changes)
    assert f"resumed at step {int(seen[-1][1].name[5:])}" in capsys.readouterr().out
    assert not list(folder.glob(".*")) and len(names(folder)) == 2
    same(tmp_path / "whole" / "checkpoints" / "step-00000024", folder / "step-00000024")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 24


def quietly(arguments: list[str], said: Path, longest: int = resource.RLIM_INFINITY) -> None:
    """A run in a process that has imported all it needs, and may write files of at most so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from trainer.cli import train

    sys.exit(train(arguments))


# ---- what a run goes on from

def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    """The very file, but elsewhere."""
    path.rename(path.parent.parent.parent / path.name)
    path.symlink_to(path.parent.parent.parent / path.name)


DAMAGE = [
    (flip, "model.safetensors", "model.safetensors is not as it was written (its SHA-256 differs)"),
    (flip, "optimizer.safetensors", "optimizer.safetensors is not as it was written"),
    (flip, "random-0.safetensors", "random-0.safetensors is not as it was written"),
    (flip, "state.json", "state.json is not as it was written"),
    (cut_off, "optimizer.safetensors", "optimizer.safetensors has "),
    (cut_off, "state.json", "state.json is not as it was written: no JSON: "),
    (Path.unlink, "model.safetensors", "model.safetensors is missing"),
    (Path.unlink, "random-0.safetensors", "random-0.safetensors is missing"),
    (Path.unlink, "state.json", "state.json is missing"),
    (pipe, "model.safetensors", "model.safetensors is no regular file"),
    (link, "model.safetensors", "model.safetensors is no regular file"),
]


def test_the_newest_that_verifies_is_taken_and_the_others_are_named(train_here, capsys, tmp_path):
    """Every kind of damage to every kind of file; each is kept aside, and the run ends as if nothing had happened."""
    whole = train_here("whole", **SETTINGS).folder
    for number, (damage, name, said) in enumerate(DAMAGE):
        run = tmp_path / f"damaged-{number}"
        shutil.copytree(whole.path, run)
        newest = checkpoints.latest(run / "checkpoints")
        damage(newest / name)
        if number in (0, 3):  # trained to the end: of the others what is taken is enough
            capsys.readouterr()
            trainer = train_here("whole", overrides=(f"run.folder={run}",), **SETTINGS)
            out = capsys.readouterr().out
            assert f"passed over the checkpoint step-00000006: {said}" in out
            assert "it is kept as damaged-step-00000006" in out and "resumed at step 4" in out
            same(whole.checkpoints / "step-00000006", trainer.folder.checkpoints / "step-00000006")
            assert losses(whole.path) == losses(run)
        else:
            heard: list[str] = []
            found = checkpoints.newest_good(run / "checkpoints", say=heard.append)
            assert found.name == "step-00000004" and len(heard) == 1 and said in heard[0], damage
        assert (run / "checkpoints" / "damaged-step-00000006").exists()


def test_a_second_damaged_one_of_a_step_gets_a_number(tmp_path):
    _, engine = small()
    for kept in ("damaged-step-00000004", "damaged-step-00000004-2", "damaged-step-00000004-3"):
        saving = store(tmp_path, said := [])
        for step in (2, 4):
            saving.save(step, engine, {})
            saving.finish()
        flip(tmp_path / "step-00000004" / "model.safetensors")
        assert store(tmp_path, said).newest_good().name == "step-00000002"
        assert said[0].endswith(f"it is kept as {kept}") and (tmp_path / kept).is_dir()


def test_where_none_verifies_each_is_named_and_nothing_is_touched(train_here):
    folder = train_here("lost", **SETTINGS).folder
    flip(folder.checkpoints / "step-00000004" / "model.safetensors")
    cut_off(folder.checkpoints / "step-00000006" / "state.json")
    before = {path: path.stat().st_mtime_ns for path in folder.checkpoints.rglob("*")}
    with pytest.raises(RunFailed) as caught:
        train_here("lost", **SETTINGS)
    said = str(caught.value)
    assert "step-00000004: model.safetensors is not as it was written" in said
    assert "step-00000006: state.json is not as it was written: no JSON: " in said
    assert "put one back from a copy, or move that folder away" in said and "begins anew" in said
    assert {path: path.stat().st_mtime_ns for path in folder.checkpoints.rglob("*")} == before


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    _, engine = small()
    saving = store(tmp_path, [])
    saving.save(2, engine, {})
    saving.finish()
    for name in (".step-00000004-1.partial", ".step-00000001.removed"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / name)
    assert checkpoints.newest_good(tmp_path) == tmp_path / "step-00000002"
    assert names(tmp_path) == ["step-00000002"]


def test_a_checkpoint_of_before_there_were_hashes(tmp_path):
    """It loads; sizes and headers are looked at."""
    _, engine = small()
    saving = store(tmp_path, [])
    saving.save(2, engine, {"nonfinite": 0})
    saving.finish()
    file = tmp_path / "step-00000002" / "state.json"
    old = json.loads(file.read_text())
    del old["sha256"]
    old["files"] = {name: entry["bytes"] for name, entry in old["files"].items()}
    file.write_text(json.dumps(old, indent=1))
    random_file = tmp_path / "step-00000002" / "random-0.safetensors"
    state = load_file(random_file)
    random_file.unlink()
    from safetensors.torch import save_file

    save_file({"cpu": state["cpu"]}, random_file)
    old["files"]["random-0.safetensors"] = random_file.stat().st_size
    file.write_text(json.dumps(old, indent=1))
    assert checkpoints.newest_good(tmp_path).name == "step-00000002"
    assert checkpoints.load(tmp_path / "step-00000002", engine, 0)["nonfinite"] == 0
    data = bytearray((tmp_path / "step-00000002" / "model.safetensors").read_bytes())
    data[:8] = b"\xff" * 8
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(data)
    with pytest.raises(RunFailed, match="it cannot be read"):
        checkpoints.newest_good(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"files": {"../../outside.safetensors": {"bytes": 4, "sha256": "0"}}}, "names '../../outside.safetensors'"),
    ({"files": {"/etc/hostname": {"bytes": 4, "sha256": "0"}}}, "names '/etc/hostname', which is no file of a"),
    ({"files": {"model.safetensors": {"bytes": 2**60, "sha256": "0"}}}, "bytes of 1,152,921,504,606,846,976"),
    ({"files": {"model.safetensors": {"bytes": "many", "sha256": "0"}}}, "names 'model.safetensors', which is no"),
    ({"files": {"optimizer.bin": {"bytes": 4, "sha256": "0"}}}, "names 'optimizer.bin', which is no file of a"),
    ({"files": []}, "does not say which files and shapes it has"),
    ({"shapes": None}, "does not say which files and shapes it has"),
    ({"step": 40}, "state.json is of step 40"),
    ({"step": {"a": 1}}, "state.json is of step {'a': 1}"),
])
def test_a_manifest_that_lies_with_a_right_hash(tmp_path, change, said):
    _, engine = small()
    saving = store(tmp_path, [])
    saving.save(2, engine, {})
    saving.finish()
    file = tmp_path / "step-00000002" / "state.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    file.write_text(sealed({**manifest, **change}))
    assert said in checkpoints.wrong_with(file.parent)


@pytest.mark.parametrize("text, said", [
    ("[" * 100_000, "no JSON: "), ("1" * 5_000, "no JSON: "), ("[]", "no JSON object, but a list"), ("", "no JSON: "),
    (None, "a file of 1,099,511,627,776 bytes, over 67,108,864"),
])
def test_a_manifest_that_is_none(tmp_path, text, said):
    checkpoint = tmp_path / "step-00000002"
    checkpoint.mkdir()
    file = checkpoint / "state.json"
    if text is None:
        with file.open("wb") as handle:
            handle.truncate(2**40)  # of which the disk has nothing
    else:
        file.write_text(text)
    assert said in checkpoints.wrong_with(checkpoint)


# ---- disks that are full

@contextmanager
def no_file_longer_than(size: int):
    """The kernel refuses what is written beyond; free space looks as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_in_the_middle_costs_that_checkpoint_and_no_more(tmp_path):
    _, engine = small()
    saving = store(tmp_path, said := [])
    with no_file_longer_than(1000):
        saving.save(1, engine, {})
    assert names(tmp_path) == [] and "nothing is saved yet" in said[0]
    saving.save(2, engine, {})
    saving.finish()
    with no_file_longer_than(1000):
        saving.save(4, engine, {})
    assert len(said) == 2 and names(tmp_path) == ["step-00000002"]
    assert "warning: the checkpoint step-00000004 was not written: File too large. It takes " in said[1]
    assert f"are free in {tmp_path}. Training goes on; the run is safe up to step-00000002" in said[1]
    assert "make room: the next checkpoint is tried again" in said[1]
    saving.save(4, engine, {})
    saving.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000004"] and len(said) == 2


def test_a_failure_behind_training_is_found_too(tmp_path):
    """What the thread writes itself, the manifest, is refused: as on a disk that fills between write and sync."""
    _, engine = small()
    saving = store(tmp_path, said := [])
    saving.save(2, engine, {})
    saving.finish()
    with no_file_longer_than(60_000):
        saving.save(4, engine, {"large": "x" * 100_000})
        saving.finish()
    assert names(tmp_path) == ["step-00000002"] and saving.last.name == "step-00000002"
    assert len(said) == 1 and "step-00000004 was not written: File too large" in said[0]


def test_two_processes_give_up_together(tmp_path):
    """The disk of the second process alone is full; then it is not, and both go on."""
    results = [FORKED.Process(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in results:
        process.start()
    for process in results:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in results] == [0, 0]
    (said,) = (tmp_path / "said").read_text().splitlines()[:1]
    assert "step-00000002 was not written: process 1: File too large" in said
    assert names(tmp_path / "checkpoints") == ["step-00000004"]
    assert set(names(tmp_path / "checkpoints" / "step-00000004")) == {
        "model.safetensors", "optimizer.safetensors", "random-0.safetensors", "random-1.safetensors", "state.json"}
    assert checkpoints.wrong_with(tmp_path / "checkpoints" / "step-00000004") is None


def one_of_two(rank: int, folder: Path) -> None:
    """Saves twice, the first time with too little room on one of the processes."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "meeting"), 2), rank=rank, world_size=2,
                            timeout=timedelta(seconds=30))

    def gather(own: list) -> list:
        every = [None, None]
        dist.all_gather_object(every, own[0])
        return every

    _, engine = small()
    saving = store(folder / "checkpoints", said := [], rank=rank, ranks=2, gather=gather)
    with no_file_longer_than(1000 if rank else 2**40):
        saving.save(2, engine, {})
    saving.save(4, engine, {})
    saving.finish()
    assert (saving.last is None) == bool(rank) and saving.newest_good().name == "step-00000004"
    if not rank:
        (folder / "said").write_text("\n".join(said))


def test_metrics_wait_in_memory_for_room(tmp_path, capsys):
    """A disk that takes half a line takes the other half later; what it never takes is said."""
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, True, 0)
    with no_file_longer_than(60):
        for step in range(1, 6):
            metrics.write({"step": step, "loss": 0.5})
        assert file.stat().st_size == 60 and [line["step"] for line in read_lines(file)] == [1, 2]
    metrics.write({"step": 6, "loss": 0.5})
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3, 4, 5, 6]
    with no_file_longer_than(10):
        metrics.write({"step": 7, "loss": 0.5})
        metrics.write({"step": 8, "loss": 0.5})
        metrics.close()
    assert f"warning: 2 last lines of {file} are lost: there is too little room" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted],
                                      capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_disk_that_fills_keeps_the_run_alive(train_here, small_disk, capsys):
    """It is full for two checkpoints, and has room for the last; no metrics are lost."""
    from trainer.training.loop import TrainLoop

    plain = TrainLoop.train_step

    def step(trainer, inputs):
        filler = small_disk / "filler"
        if trainer.state.step == 2:
            trainer.saver.finish()  # a checkpoint that is being committed may still need room
            with filler.open("wb", buffering=0) as handle:
                try:
                    while True:
                        handle.write(b"x" * 4096)
                except OSError:
                    pass
        if trainer.state.step == 9:
            filler.unlink()
        return plain(trainer, inputs)

    TrainLoop.train_step = step
    try:
        changes = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 10},
                   "run": {"trackers": ["tensorboard"]}}
        trainer = train_here("full", overrides=(f"run.folder={small_disk / 'run'}",), **changes)
    finally:
        TrainLoop.train_step = plain
    out = capsys.readouterr().out
    for lost, last in ((4, 2), (6, 2), (8, 2)):
        assert f"the checkpoint step-0000000{lost} was not written: there is too little room" in out
        assert f"safe up to step-0000000{last}" in out
    assert names(trainer.folder.checkpoints) == ["step-00000002", "step-00000010"]
    assert [step for step, _ in losses(trainer.folder.path)] == list(range(1, 11))


def test_a_disk_without_room_is_said_before_training(write_experiment, small_disk, tmp_path):
    """What checkpoints take is known from shapes; those that are there already count."""
    wide = {**TINY, "hidden_size": 256, "intermediate_size": 512}
    file = write_experiment("wide", student={"architecture": wide}, run={"folder": str(small_disk / "run")})
    done = train_py("--config", str(file), "training.steps=30")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"run.folder = '{small_disk / 'run'}'" in done.stderr and "checkpoints do not fit: 3 of " in done.stderr
    assert "MiB are free there" in done.stderr and "set training.keep_checkpoints=1 (now 2)" in done.stderr
    assert not (small_disk / "run").exists()


def test_a_sharded_student_needs_its_last_checkpoint(write_experiment, tmp_path):
    """Every checkpoint is refused; the student cannot be put together, and the run does not look finished."""
    file = write_experiment("sharded")
    process = FORKED.Process(target=quietly, args=(["--config", str(file), "sharding.engine=fsdp2"], tmp_path / "said",
                                                   120_000))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said
    assert "the checkpoint step-00000004 was not written: File too large" in said
    assert "put together from its last checkpoint, which could not be written" in said
    assert "goes on from its beginning" in said and not (tmp_path / "sharded" / "student").exists()


# ---- what else goes on

def test_trackers_go_on_without_doubled_points(write_experiment, train_here, tmp_path):
    """Killed after a checkpoint, a run does steps again that are in TensorBoard; every step is there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"run": {"trackers": ["tensorboard"]},
               "training": {"steps": 40, "checkpoint_every": 5, "evaluate_every": 10, "micro_batch": 4}}
    file = str(write_experiment("tracked", **changes))
    process = FORKED.Process(target=quietly, args=(["--config", file], tmp_path / "said"))
    process.start()
    while len(losses_so_far(tmp_path / "tracked")) < 8 and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    identity = (tmp_path / "tracked" / "tracker.id").read_text()
    assert len(identity) == 16
    time.sleep(1)  # event files are read in the order of the seconds in their names
    assert train_here("tracked", **changes).state.step == 40
    assert (tmp_path / "tracked" / "tracker.id").read_text() == identity
    (folder,) = {path.parent for path in (tmp_path / "tracked" / "limbeck").glob("events*")}
    assert len(list(folder.glob("events*"))) == 2
    points = EventAccumulator(str(folder))
    points.Reload()
    assert [point.step for point in points.Scalars("loss")] == list(range(1, 41))


def losses_so_far(folder: Path) -> list[tuple[int, float]]:
    return losses(folder) if (folder / "metrics.jsonl").exists() else []

"""Mistakes of several processes: one clear message within seconds, no exit code 0, and nobody left waiting."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.sharding.launching import environment, launched
from tests.conftest import ROOT, _train, fork, launch, on_two_ranks, train_py, two_ranks
from trainer.distributed.launch import check_engine, start
from trainer.distributed.topology import Topology
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import describe, read_experiment
from trainer.planning.plan import check_batch

SOON = 100  # seconds: what hangs is found, what is slow is not


def refused(done, *parts):
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr[-3000:]
    for part in parts:
        assert part in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("changes, parts", [
    (["sharding.engine=ddp", "sharding.stage=2"], ["sharding.stage", "engine ddp has no such stage", "engine: zero"]),
    (["sharding.engine=fsdp2", "sharding.stage=1"], ["sharding.stage", "fsdp2 has 2 and 3"]),
    (["sharding.engine=zero", "sharding.stage=2", "sharding.offload.parameters=true"],
     ["sharding.offload.parameters", "stage: 3"]),
    (["sharding.engine=fsdp2", "sharding.offload.optimizer=true"], ["sharding.offload.optimizer", "takes it along"]),
    (["sharding.engine=zero", "sharding.bucket=lots"], ["sharding.bucket", "not a number of bytes"]),
    (["optimizer.in_backward=true"], ["training.clip", "set it to null"]),
    (["optimizer.in_backward=true", "training.clip=null", "precision.dtype=fp16"], ["precision.dtype", "use bf16"]),
    (["sharding.engine=zerro"], ["sharding.engine", "'zerro'"]),
])
def test_what_no_engine_can_do(write_experiment, changes, parts):
    with pytest.raises((ExperimentErrors, ValueError)) as caught:
        read_experiment(write_experiment(), changes)
    (error,) = getattr(caught.value, "errors", [caught.value])
    said = f"{error.key} {error.problem} {error.way_out}"
    assert all(part in said or part in str(error.value) or part in repr(error.value) for part in parts), said


@pytest.mark.parametrize("processes, changes, parts", [
    (2, ["sharding.engine=zero", "optimizer.name=muon"], ["optimizer.name = 'muon'", "whole matrices", "fsdp2"]),
    (1, ["sharding.engine=zero", "optimizer.name=muon"], ["optimizer.name = 'muon'", "whole matrices", "fsdp2"]),
    (2, ["optimizer.in_backward=true", "training.clip=null", "training.micro_batch=4", "sharding.engine=zero"],
     ["optimizer.in_backward = True", "zero sums gradients", "fsdp2"]),
    (2, ["optimizer.in_backward=true", "training.clip=null", "training.micro_batch=4"],
     ["optimizer.in_backward = True", "ddp sums gradients", "fsdp2"]),
    (2, ["optimizer.in_backward=true", "training.clip=null", "training.micro_batch=2", "sharding.engine=fsdp2"],
     ["optimizer.in_backward = True", "wait for no other micro-batch", "batch_size of 8", "training.batch_size=4"]),
    (1, ["optimizer.in_backward=true", "training.clip=null", "training.micro_batch=4"],
     ["optimizer.in_backward = True", "wait for no other micro-batch", "training.batch_size=4"]),
    (4, ["training.batch_size=6", "training.micro_batch=1"],
     ["training.micro_batch = 1", "4 processes with this micro_batch cannot share a batch_size of 6", "multiple of 4"]),
    (2, ["training.micro_batch=8"], ["2 processes with this micro_batch", "micro_batch can be 1, 2, 4"]),
    (2, ["sharding.engine=none"], ["sharding.engine = 'none'", "each would train alone", "ddp, fsdp2 or zero"]),
])
def test_what_so_many_processes_cannot_do(write_experiment, processes, changes, parts):
    source = read_experiment(write_experiment(), changes)
    with pytest.raises(UserError) as caught:
        asked, topology = source.experiment, Topology(data_parallel=processes)
        check_engine(asked.sharding, asked.optimizer, topology)
        check_batch(asked.training, asked.optimizer, topology)
    said = describe(caught.value, source.origins, source.file)
    assert said.startswith("override ") and "\n  -> " in said, said
    assert all(part in said for part in parts), said


def test_a_dry_run_says_so_before_anything_starts(write_experiment):
    done = train_py("--config", str(write_experiment()), "--dry-run", "memory.processes=64", "sharding.engine=zero",
                    "training.batch_size=64", "training.micro_batch=1", "optimizer.name=muon", timeout=SOON)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    refused(done, "override `optimizer.name=muon`: optimizer.name = 'muon'", "whole matrices", "fsdp2")


def test_other_processes_than_were_planned_for(write_experiment, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        start(read_experiment(write_experiment(), ["memory.processes=3"]).experiment)
    assert caught.value.key == "memory.processes" and "2 processes were launched" in caught.value.problem


@pytest.mark.parametrize("changes, parts", [
    (["training.micro_batch=8"], ["2 processes with this micro_batch", "micro_batch can be 1, 2, 4"]),
    (["sharding.engine=none"], ["sharding.engine = 'none'", "2 processes were launched"]),
])
def test_two_processes_say_it_once(write_experiment, tmp_path, changes, parts):
    done = on_two_ranks("--config", str(write_experiment()), *changes, timeout=SOON)
    refused(done, *parts)
    assert not (tmp_path / "tiny").exists()


@pytest.fixture
def without(tmp_path, monkeypatch):
    """Makes a package look as if it were not installed, in processes started from here."""
    def hide(name: str) -> None:
        folder = tmp_path / "hidden"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import importlib.util, sys\n"
            "find = importlib.util.find_spec\n"
            f"importlib.util.find_spec = lambda name, *rest: None if name == {name!r} else find(name, *rest)\n"
            "class Hidden:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] == {name!r}:\n"
            f"            raise ModuleNotFoundError('No module named ' + {name!r}, name={name!r})\n"
            "sys.meta_path.insert(0, Hidden())\n")
        monkeypatch.setenv("PYTHONPATH", str(folder))
    return hide


def test_without_deepspeed(write_experiment, without):
    without("deepspeed")
    done = launch("--config", str(write_experiment()), "sharding.engine=zero", "training.micro_batch=4", processes=2,
                  timeout=SOON)
    refused(done, "sharding.engine = 'zero'", "DeepSpeed", "pip install 'limbeck[zero]'", "fsdp2")
    done = train_py("--config", str(write_experiment()), "--dry-run", "sharding.engine=zero", timeout=SOON)
    assert done.returncode == 0, "a plan needs no engine"


def test_without_bitsandbytes(write_experiment, without):
    without("bitsandbytes")
    for more in ([], ["--dry-run"]):
        done = train_py("--config", str(write_experiment()), "optimizer.name=adamw8bit", *more, timeout=SOON)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        refused(done, "optimizer.name = 'adamw8bit'", "bitsandbytes", "pip install 'limbeck[adamw8bit]'")


def by_hand(folder: Path, arguments: list[list[str]]) -> list[subprocess.CompletedProcess]:
    """Processes of one group, each with its own arguments, as if started on machines of their own."""
    folder.mkdir()
    started, said = [], []
    for rank, (told, own) in enumerate(zip(two_ranks(), arguments, strict=True)):
        said.append([folder / f"{name}{rank}" for name in ("stdout", "stderr")])
        told = {**environment(), **told, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        started.append(fork(told, said[-1], _train, own))
    for process in started:
        process.join(SOON)
        assert process.exitcode is not None, "it does not end"
    return [subprocess.CompletedProcess(own, process.exitcode, *(file.read_text() for file in files))
            for own, process, files in zip(arguments, started, said, strict=True)]


def test_another_experiment_on_one_process(write_experiment, tmp_path):
    file = str(write_experiment())
    for changes, parts in ((["optimizer.lr=0.5"], ["optimizer.lr = 0.003", "process 1", "there it is 0.5"]),
                           (["sharding.engine=zero"], ["sharding.engine = None", "process 1", "there it is 'zero'"])):
        first, second = by_hand(tmp_path / parts[2], [["--config", file, "training.micro_batch=4"],
                                                      ["--config", file, "training.micro_batch=4", *changes]])
        refused(first, *parts, "the same file")
        assert second.returncode != 0 and "Traceback" not in first.stderr + second.stderr


def test_a_mistake_of_one_process_alone_reaches_a_person(write_experiment):
    """Its message is said by itself, and the launcher ends the others."""
    done = in_two_processes(write_experiment(), "arguments.append('optimizer.lrr=1')")
    assert done.returncode != 0 and "process 1: error: " in done.stderr
    assert "did you mean `optimizer.lr`?" in done.stderr


def test_a_process_that_dies_at_start_up(write_experiment):
    file = write_experiment()
    done = in_two_processes(file, "os._exit(9)")
    assert done.returncode != 0 and "exitcode  : 9" in done.stderr
    assert not (file.parent / "tiny").exists(), "the other one was ended, and did not go on alone"


def in_two_processes(file, on_the_second):
    """train.py through the launcher; the second process does something of its own first."""
    script = file.with_name("two.py")
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"arguments = ['--config', {str(file)!r}, 'training.micro_batch=4']\n"
        f"if os.environ['RANK'] == '1':\n    {on_the_second}\n"
        "from trainer.cli import train\n"
        "sys.exit(train(arguments))\n")
    return launched(script, capture_output=True, timeout=SOON)


@pytest.mark.parametrize("name, asked", [
    ("DeepSpeed", {"deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False}}),
    ("FSDP", {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True}})])
def test_a_launcher_that_asks_for_an_engine_itself(write_experiment, tmp_path, monkeypatch, name, asked):
    """One thing is never said in two files."""
    file = tmp_path / "launcher.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load((ROOT / "launch" / "one_node.yaml").read_text()), **asked,
                                    "distributed_type": name.upper(), "num_processes": 1}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), str(ROOT / "train.py"),
               "--config", str(write_experiment()), "sharding.engine=fsdp2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SOON, cwd=ROOT)
    refused(done, f"asks for {name}", "sharding.engine fsdp2", "names processes and machines only")
    assert not (tmp_path / "tiny").exists()

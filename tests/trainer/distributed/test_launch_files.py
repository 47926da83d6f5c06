"""Every file in launch/ is tried; what it says is topology and nothing else."""

import os
import socket
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
TOPOLOGY = {"compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank", "gpu_ids",
            "main_process_ip", "main_process_port", "rdzv_backend", "same_network", "mixed_precision"}
BIN = os.path.dirname(sys.executable)


@pytest.fixture
def small(write_experiment):
    return ["--config", str(write_experiment(training={"steps": 2, "micro_batch": 2, "evaluate_every": 100}))]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_files_say_topology_only(file):
    assert set(yaml.safe_load(file.read_text())) <= TOPOLOGY
    read = load_config_from_file(str(file))
    assert isinstance(read, ClusterConfig) and read.mixed_precision == "no"
    assert not read.deepspeed_config and not read.fsdp_config


def test_every_file_is_tried_here():
    assert {file.name for file in LAUNCH.iterdir()} == {"one_process.yaml", "two_cpu_ranks.sh", "one_node.yaml",
                                                        "many_nodes.yaml", "slurm.sh"}


def test_one_node(small, tmp_path):
    """As on a machine with GPUs, with two processes on the CPU."""
    done = subprocess.run(["accelerate", "launch", "--config_file", str(LAUNCH / "one_node.yaml"), "--num_processes",
                           "2", str(ROOT / "train.py"), *small, "sharding.engine=fsdp2"],
                          env=environment(), capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny: 2 process(es) on cpu" in done.stdout and "tiny: done" in done.stdout


def test_many_nodes(small):
    """Two machines that are one, each with its own launcher."""
    command = ["accelerate", "launch", "--config_file", str(LAUNCH / "many_nodes.yaml"), "--num_machines", "2",
               "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    started = [subprocess.Popen([*command, "--machine_rank", rank, str(ROOT / "train.py"), *small], env=environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for rank in "01"]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][1][-3000:]
    assert "tiny: 2 process(es) on cpu" in said[0][0] and "tiny: done" in said[0][0]
    assert "tiny: done" not in said[1][0], "only the first process tells"


def test_slurm(small, tmp_path):
    """The script as Slurm would run it: one launcher on each of two nodes, which are this machine."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho other\n")
    (stubs / "srun").write_text('#!/bin/bash\nshift\nSLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@"\n'
                                'first=$?\nwait $other && exit $first\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    done = subprocess.run(
        [str(LAUNCH / "slurm.sh"), *small], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env=environment(PATH=f"{stubs}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", SLURM_GPUS_ON_NODE="1",
                        SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="two", MASTER_PORT=free_port(),
                        LIMBECK_ROOT=str(ROOT)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tiny: done") == 1 and "tiny: 2 process(es) on cpu" in done.stdout

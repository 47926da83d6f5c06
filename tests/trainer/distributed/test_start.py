"""Start-up: what was launched is what runs, or it does not run."""

import pytest

from tests.conftest import ROOT, train_py
from trainer.distributed.launch import start
from trainer.distributed.topology import Topology
from trainer.errors import RunFailed, UserError
from trainer.experiment.load import read_experiment


@pytest.fixture
def experiment(write_experiment):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return read_experiment(write_experiment()).experiment


def test_processes_that_would_each_train_alone(experiment, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some launch routes on CPU leave it
    with pytest.raises(RunFailed, match="started 2 processes but they train as 1"):
        start(experiment)


def test_accelerates_own_accumulation_is_refused(experiment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(RunFailed, match="gradient accumulation 4"):
        start(experiment)


def test_accelerates_own_precision_is_not_used(experiment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator, topology = start(experiment)
    assert accelerator.mixed_precision == "no" and accelerator.scaler is None
    assert topology == Topology(data_parallel=1, device=accelerator.device.type)


def test_interrupted_by_hand_says_how_to_go_on(write_experiment, tmp_path):
    import signal
    import subprocess
    import sys
    import time

    file = write_experiment(training={"steps": 5000, "checkpoint_every": 5})
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--config", str(file)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               # where tests run in the background, a shell has made children deaf to Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "tiny" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "start the same command again to go on" in said and "Traceback" not in said
    done = train_py("--config", str(file), "seed=1")
    assert done.returncode == 2 and "seed was 0 and is 1" in done.stderr


def test_degrees_of_parallelism_are_apart_and_what_is_not_there_is_refused():
    topology = Topology(data_parallel=4, device="cuda")
    assert (topology.ranks, topology.devices, topology.data_rank(3), topology.on_gpu) == (4, 4, 3, True)
    assert topology.to_dict()["tensor"] == topology.to_dict()["pipeline"] == topology.to_dict()["context"] == 1
    for name in ("tensor", "pipeline", "context"):
        with pytest.raises(UserError, match=f"{name} parallelism is not supported: its degree is 1") as caught:
            Topology(data_parallel=2, **{name: 2})
        assert caught.value.value == 2 and "fsdp2" in caught.value.way_out

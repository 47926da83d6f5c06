"""A process that dies or stalls: the others end in time and say who did not come to what; the run then goes on."""

import json
import os
import signal
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest

from tests.conftest import _train, fork, train_py
from tests.trainer.distributed.test_signals import QUICK, nobody_stays, start, steps_of, until  # noqa: F401
from trainer.cli import limbeck
from trainer.distributed.watchdog import Place, Watch, diagnosis, missed
from trainer.errors import RunFailed
from trainer.run.metrics import read_lines

OWN = Place(beat=90, count=20, seconds=34, words="the sum of losses of step 7")
LONG = {**QUICK, "training": {**QUICK["training"], "steps": 100_000, "checkpoint_every": 5}}


def test_what_is_said_of_those_that_are_missing():
    others = {1: Place(50, 17, 3, "the batch of step 7"), 2: Place(91, 20, 33, OWN.words), 3: None,
              4: Place(88, 19, 31, "the gradients of step 7, micro-batch 2"),
              5: Place(40, 20, 1, OWN.words, "OSError: no space left")}
    silent = {1: 34.0, 2: 0.4, 3: 34.0, 4: 0.5, 5: 30.0}
    assert missed(OWN, others, silent) == [1, 3, 4, 5]
    assert diagnosis(OWN, others, silent).split("\n  ") == [
        "process 1 did not come to the sum of losses of step 7: it was last seen 34 s ago, at the batch of step 7, "
        "and is dead or stopped",
        "process 3 did not come to the sum of losses of step 7: it was never heard of",
        "process 4 did not come to the sum of losses of step 7: it is alive, and has been at the gradients of step 7, "
        "micro-batch 2 for 31 s",
        "process 5 is gone from the sum of losses of step 7: it ended at the sum of "
        "losses of step 7, by OSError: no space left"]


def test_what_is_said_where_no_single_one_is_missing():
    there = {1: Place(91, 20, 33, OWN.words)}
    assert diagnosis(OWN, there, {1: 0.5}) == (
        "all processes are at the sum of losses of step 7, this one for 34 s, and none comes any further")
    ahead = {1: Place(91, 21, 33, "the update of step 7")}
    assert diagnosis(OWN, ahead, {1: 0.5}) == ("this process has been at the sum of losses of step 7 for 34 s, and the "
                                               "others wait for it")
    many = dict.fromkeys(range(1, 20))
    assert "and 15 more processes, among 5, 6, 7" in diagnosis(OWN, many, dict.fromkeys(many, 9.0))


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_is_named_and_the_run_goes_on(write_experiment, tmp_path, dies):
    """Also the one that keeps the others' words; what was committed is there, and is gone on from."""
    file = str(write_experiment(**LONG))
    ranks = start(tmp_path, "--config", file, ranks=2)
    until(lambda: len(steps_of(tmp_path / "tiny")) > 12, "some steps", ranks)
    os.kill(ranks[dies].pid, signal.SIGKILL)
    other = ranks[1 - dies]
    assert other.end() == 1, other.err
    assert "error: " in other.err and " of step " in other.err and "Traceback" not in other.err
    if dies:
        assert "process 1 " in other.err and "last seen" in other.err and "dead or stopped" in other.err
    else:
        assert "process 0, which keeps the words of all, is gone" in other.err
    assert "its checkpoints are good: start the same command again to go on" in other.err
    assert limbeck(["status", str(tmp_path / "tiny")]) == 1
    before = len(steps_of(tmp_path / "tiny"))
    ranks = start(tmp_path, "--config", file, ranks=2)
    until(lambda: "resumed at step" in ranks[0].out, "gone on", ranks)
    until(lambda: len(steps_of(tmp_path / "tiny")) > before, "beyond", ranks)
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert [one.end() for one in ranks] == [75, 75]


def test_a_process_that_stalls_is_named_within_the_stated_time(write_experiment, tmp_path):
    file = str(write_experiment(**LONG))
    ranks = start(tmp_path, "--config", file, "run.timeout=8", ranks=2)
    until(lambda: len(steps_of(tmp_path / "tiny")) > 6, "some steps", ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    assert ranks[0].end() == 1, ranks[0].err
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert "error: process 1 " in ranks[0].err and "of step" in ranks[0].err and "dead or stopped" in ranks[0].err
    assert "run.timeout is 8 s" in ranks[0].err and "set run.timeout higher" in ranks[0].err


def _torchrun(folder: Path, *arguments: str) -> int:
    """`torchrun`, whose workers are forked from this process, which has imported what they need."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    config, _, _ = run.config_from_args(run.parse_args(
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "limbeck", "--nproc-per-node", "2",
         "--max-restarts", "1", "train.py"]))
    config.start_method = "fork"
    elastic_launch(config, _worker)(folder, arguments)
    return 0


def _worker(folder: Path, arguments: tuple[str, ...]) -> None:
    (folder / f"pid-{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(os.getpid()))
    code = _train(*arguments)
    if code:
        sys.exit(code)


def test_torchrun_restarts_go_on(write_experiment, tmp_path):
    """One process is killed once: the other ends, torchrun starts both again, and the run ends as if nothing was."""
    settings = {**QUICK, "training": {**QUICK["training"], "steps": 40, "checkpoint_every": 5}, "data": {"workers": 1}}
    whole, cut = (str(write_experiment(name, **settings)) for name in ("whole", "cut"))
    assert train_py("--config", whole).returncode == 0
    said = [tmp_path / "stdout", tmp_path / "stderr"]
    torchrun = fork({"ACCELERATE_USE_CPU": "true"}, said, _torchrun, (tmp_path, "--config", cut))
    deadline = time.monotonic() + 200
    while len(steps_of(tmp_path / "cut")) < 10 and torchrun.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid-0-0").read_text()), signal.SIGKILL)
    torchrun.join(300)
    out = said[0].read_text() + said[1].read_text()
    assert torchrun.exitcode == 0, out
    assert "resumed at step" in out and "cut: done" in out and (tmp_path / "pid-1-1").exists()
    one, two = ([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
                for name in ("whole", "cut"))
    assert len(one) == len(two) == 40
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) < 1e-5


def test_a_data_worker_that_dies_is_said(write_experiment, tmp_path):
    file = str(write_experiment(**{**LONG, "data": {"workers": 1}}))
    (run,) = start(tmp_path, "--config", file)
    until(lambda: len(steps_of(tmp_path / "tiny")) > 6, "some steps", [run])
    workers = [int(child) for task in Path(f"/proc/{run.pid}/task").iterdir()
               for child in (task / "children").read_text().split()]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    assert run.end() == 1 and "Traceback" not in run.err
    assert "error: a process that reads data for this one (data.workers) is gone, at the" in run.err
    assert "set data.workers lower" in run.err and "goes on" not in run.err
    assert json.loads((tmp_path / "tiny" / ".ended.json").read_text())["code"] == 1


def test_a_data_worker_that_dies_while_it_hands_over_is_said(tmp_path):
    with pytest.raises(RunFailed, match="reads data for this one .*data.workers.* is gone, at the batch of step 3: "):
        watch = Watch(0, 1, 60)
        with watch.on():
            watch.at("the batch of step 3")
            connection.Client(str(tmp_path / "gone"))  # as torch asks a worker for the memory of a batch
    with pytest.raises(FileNotFoundError), Watch(0, 1, 60).on():
        (tmp_path / "gone").read_text()

"""A real sweep, killed, stopped and gone on with, with a run that fails; only its runs are forked, to be quick."""

import json
import os
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.conftest import fork, forked
from trainer import cli

FORK = get_context("fork")


class Child:
    """A forked process with the part of `subprocess.Popen` that jobs need."""

    def __init__(self, command, environment, log):
        self.process = FORK.Process(target=self.run, args=(command, environment, log.fileno()))
        self.process.start()

    def run(self, command, environment, log):
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(log, stream)
        os._exit(_exit_code(command[1:]))

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)


def _exit_code(arguments):
    import sys

    from trainer.cli import train

    code = train(arguments)
    sys.stdout.flush()
    return code


def _sweep(file):
    from trainer.sweep.run_sweep import run_sweep
    from trainer.sweep.sweep_file import read_sweep

    return run_sweep(read_sweep(file), ["train.py"], spawn=Child)


@pytest.fixture
def sweep(write_experiment, tmp_path):
    """Starts a sweep of two learning rates and waits for nothing; `begun` waits for a step of the first run."""
    write_experiment("base", training={"steps": 300, "checkpoint_every": 300, "evaluate_every": 300})
    (tmp_path / "s.yaml").write_text("experiment: base.yaml\nfolder: out\nlist:\n- {training.steps: 300}\n"
                                     "- {training.steps: 6, training.evaluate_every: 6}\n"
                                     "- {training.steps: 7, student.architecture.hidden_act: no-such}\nseeds: [5]\n")
    return tmp_path


def begun(process, folder):
    """Wait for the first run's sixth step."""
    metrics = folder / "out" / "runs" / "steps-300" / "seed-5" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < deadline and process.is_alive(), (folder / "stderr").read_text()
        time.sleep(0.02)


def start(folder, name):
    return fork({}, [folder / f"{name}.out", folder / f"{name}.err"], _sweep, ("s.yaml",), cwd=folder)


def test_a_sweep_that_is_killed_stopped_and_gone_on_with(sweep, capsys, monkeypatch):
    monkeypatch.chdir(sweep)
    log = sweep / "out" / "logs" / "steps-300.seed-5.log"

    killed = start(sweep, "killed")
    begun(killed, sweep)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    record = json.loads(Path("out/sweep.json").read_text())
    assert not record["finished"] and not Path("out/sweep.png").exists()
    assert [run["state"] for run in record["runs"]] == ["running", "waiting", "waiting"]

    stopped = start(sweep, "stopped")  # waits for the run that the killed one has left
    deadline = time.monotonic() + 200
    while log.read_text().count("resumed at step") < 1:
        assert time.monotonic() < deadline and stopped.is_alive(), Path("stopped.err").read_text()
        time.sleep(0.02)
    assert "by the end of its launcher on process 0: saved" in log.read_text()
    assert cli.limbeck(["watch", "out", "--once"]) == 1
    seen = capsys.readouterr().out.splitlines()
    assert seen[0].endswith("running; 0 of 3 runs finished, 1 running") and seen[1] == "  steps-300 seed 5:"
    assert "step " in "".join(seen[2:5]) and seen[-1].endswith("waiting")
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join()
    said = Path("stopped.out").read_text()
    assert stopped.exitcode == 75 and "steps-300 seed 5: stopped" in said and "0 of 3 runs finished, 1 stopped" in said
    assert cli.limbeck(["status", "out"]) == 75 and "0 of 3 runs finished, 1 stopped" in capsys.readouterr().out

    done = forked(_sweep, ("s.yaml",), cwd=sweep)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "steps-300 seed 5: goes on" in done.stdout and "2 of 3 runs finished, 1 failed" in done.stdout
    assert "seed 5: failed with code 2: base.yaml:3: student.architecture" in done.stdout, done.stdout
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", log.read_text())]
    assert len(resumed) == 2 and 6 <= resumed[0] <= resumed[1] < 300, "each start went on where the one before ended"
    lines = map(json.loads, Path("out/runs/steps-300/seed-5/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 301)]

    table = Path("out/sweep.md").read_text()
    rows = [line for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [re.sub(r" +", " ", row)[:6] for row in rows] == ["| 300 ", "| 6 | ", "| 7 | "] and "1 failed" in rows[2]
    found = json.loads(Path("out/runs/steps-300/seed-5/comparison.json").read_text())["student"]["bits_per_byte"]
    record = json.loads(Path("out/sweep.json").read_text())
    assert record["settings"][0]["mean"] == found and not record["finished"]

    Path("out/sweep.md").unlink()  # made again from the folder; a run that is not there any more is no result
    assert cli.limbeck(["report", "out"]) == 0 and Path("out/sweep.md").read_text() == table
    Path("out/runs/steps-300/seed-5/report.md").rename("report.md")
    assert cli.limbeck(["report", "out"]) == 0 and "1 of 3 runs finished, 1 failed" in Path("out/sweep.md").read_text()
    Path("report.md").rename("out/runs/steps-300/seed-5/report.md")
    capsys.readouterr()
    assert cli.limbeck(["watch", "out", "--once"]) == 1
    seen = capsys.readouterr().out
    assert "steps-6_evaluate_every-6 seed 5: bits_per_byte " in seen and "seed 5: failed: base.yaml:3:" in seen

    Path("base.yaml").write_text(Path("base.yaml").read_text().replace("lr: 0.003", "lr: 0.004"))
    assert cli.limbeck(["sweep", "s.yaml"]) == 2
    said = capsys.readouterr().err
    assert re.match(r"error: base.yaml:\d+: optimizer.lr = 0.004: out/runs/steps-300/seed-5 belongs to another "
                    r"experiment: optimizer.lr was 0.003 and is 0.004\n  -> ", said), said
    assert "another `folder` or `name` of the sweep" in said

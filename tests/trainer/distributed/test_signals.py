"""Signals at any moment: all processes agree, save and end with 75; the same command goes on to the same end."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.clients import CLIENTS
from tests.conftest import FORKED, ROOT, _in_fork, _train, train_py, two_ranks, with_clients
from trainer.cli import limbeck
from trainer.data.temporary_folder import temporary_folder
from trainer.distributed import signals
from trainer.experiment.load import read_experiment
from trainer.run.metrics import read_lines

QUICK = {"training": {"steps": 400, "micro_batch": 4, "evaluate_every": 1000, "checkpoint_every": 1000},
         "report": {"sample_tokens": 1}}


@pytest.fixture(autouse=True)
def nobody_stays():
    """Processes that a failed test has left behind would train on for long."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@dataclass
class Started:
    """A process of a run, as `train.py` is started by a launcher, and where it writes to."""

    process: object
    said: list[Path]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.said[0].read_text() if self.said[0].exists() else ""

    @property
    def err(self) -> str:
        return self.said[1].read_text() if self.said[1].exists() else ""

    def end(self, timeout: float = 200) -> int:
        """Its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it did not end\n{self.out}\n{self.err}"
        return self.process.exitcode


def start(folder: Path, *arguments: str, ranks: int = 1, environments: list[dict[str, str]] | None = None
          ) -> list[Started]:
    """Start a run on some processes, each the leader of a group of its own, forked from one that has imported all."""
    number = len(list(folder.glob("said-*")))
    started = []
    for rank, own in enumerate(environments or (two_ranks() if ranks == 2 else [{}])):
        environment = with_clients(own)
        said = [folder / f"said-{number}-{rank}-{name}" for name in ("stdout", "stderr")]
        process = FORKED.Process(target=_leader, args=(environment, str(ROOT), said, _train, arguments))
        process.start()
        started.append(Started(process, said))
    return started


def _leader(*arguments) -> None:
    os.setsid()
    _in_fork(*arguments)


def until(condition, what: str, started: list[Started], timeout: float = 200) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not {what}: {[one.out + one.err for one in started]}"
        assert started[0].process.exitcode is None, f"ended before {what}: {started[0].out}{started[0].err}"
        time.sleep(0.002)


def steps_of(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [line["step"] for line in read_lines(file) if "loss" in line] if file.exists() else []


def losses(folder: Path) -> list[tuple]:
    return [(line["step"], line.get("loss"), line.get("held_out")) for line in read_lines(folder / "metrics.jsonl")
            if "loss" in line or "held_out" in line]


def ended(folder: Path) -> dict:
    return json.loads((folder / signals.ENDED).read_text())


def test_a_signal_on_either_process_stops_both_after_a_step(write_experiment, tmp_path):
    """The first process tells who was asked; `limbeck status` knows; begun again, the run ends as if never stopped."""
    settings = {**QUICK, "training": {**QUICK["training"], "steps": 40}}
    whole, cut = (str(write_experiment(name, **settings)) for name in ("whole", "cut"))
    assert [one.end() for one in start(tmp_path, "--config", whole, ranks=2)] == [0, 0]
    for name, number, rank in (("SIGTERM", signal.SIGTERM, 1), ("SIGUSR1", signal.SIGUSR1, 0)):
        before = len(steps_of(tmp_path / "cut"))
        ranks = start(tmp_path, "--config", cut, ranks=2)
        until(lambda seen=before: len(steps_of(tmp_path / "cut")) >= seen + 3, "some steps", ranks)
        os.kill(ranks[rank].pid, number)
        assert [one.end() for one in ranks] == [75, 75], ranks[0].err
        step = max(steps_of(tmp_path / "cut"))
        assert before + 3 <= step < 40
        assert f"stopped at step {step} by {name} on process {rank}: saved; start the same command" in ranks[0].err
        assert ranks[1].err.count("stopped at") == 0, "one process tells"
        assert (tmp_path / "cut" / "checkpoints" / f"step-{step:08d}").exists()
        assert {**ended(tmp_path / "cut"), "said": ""} == {"code": 75, "step": step, "signal": name, "process": rank,
                                                           "said": ""}
        assert limbeck(["status", str(tmp_path / "cut")]) == 75
    assert [one.end() for one in start(tmp_path, "--config", cut, ranks=2)] == [0, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not (tmp_path / "cut" / signals.ENDED).exists()
    for name, tensor in load_file(tmp_path / "whole" / "student" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "cut" / "student" / "model.safetensors")[name]), name
    assert limbeck(["status", "--config", cut]) == 0


def test_in_an_evaluation_and_in_a_save_a_signal_waits_for_neither_more_nor_less(write_experiment, tmp_path):
    """An evaluation is left at its next micro-batch and made up for; a save is finished; workers know of nothing."""
    settings = {"data": {"validation": {"fraction": 0.3, "rows": 20}, "workers": 1}, "report": {"sample_tokens": 1},
                "training": {"steps": 6, "micro_batch": 1, "evaluate_every": 1, "checkpoint_every": 1}}
    whole, cut = (str(write_experiment(name, **settings)) for name in ("whole", "cut"))
    assert train_py("--config", whole).returncode == 0
    saves = tmp_path / "cut" / "checkpoints"
    moments = {"evaluation": lambda: len(steps_of(tmp_path / "cut")) == 2,
               "save": lambda: any(".partial" in path.name for path in saves.glob(".step-0000000[3-6]*"))}
    for what, moment in moments.items():
        (run,) = start(tmp_path, "--config", cut)
        until(moment, what, [run])
        os.killpg(run.pid, signal.SIGTERM)  # the data workers of the group, too
        assert run.end() == 75, run.err
        step = ended(tmp_path / "cut")["step"]
        assert (saves / f"step-{step:08d}").exists() and not list(saves.glob(".*"))
        assert "DataLoader" not in run.err and "Traceback" not in run.err
        if what == "evaluation":
            assert losses(tmp_path / "cut")[-1][0] == step and losses(tmp_path / "cut")[-1][2] is None, "it was left"
    (run,) = start(tmp_path, "--config", cut)
    assert run.end() == 0, run.err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_ctrl_c_once_saves_and_twice_stops_at_once(write_experiment, tmp_path):
    """At once means: although the process waits for another one, which is stopped and never comes."""
    file = str(write_experiment(**{**QUICK, "training": {**QUICK["training"], "steps": 100_000}}))
    ranks = start(tmp_path, "--config", file, ranks=2)
    until(lambda: steps_of(tmp_path / "tiny"), "a step", ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    os.kill(ranks[0].pid, signal.SIGINT)
    until(lambda: "stopping at the next step, Ctrl-C stops at once" in ranks[0].err, "an answer", ranks)
    time.sleep(signals.APART)
    os.kill(ranks[0].pid, signal.SIGINT)
    assert ranks[0].end() == 130
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert "stopped by SIGINT on process 0, at once: steps since the newest checkpoint are done again" in ranks[0].err
    assert limbeck(["status", str(tmp_path / "tiny")]) == 1, "nobody wants it to be queued again"
    again = time.time()
    ranks = start(tmp_path, "--config", file, ranks=2)
    until(lambda: (tmp_path / "tiny" / "metrics.jsonl").stat().st_mtime > again and steps_of(tmp_path / "tiny"),
          "a step", ranks)
    for rank in ranks:  # as on a terminal
        os.kill(rank.pid, signal.SIGINT)
    assert [rank.end() for rank in ranks] == [75, 75] and "by SIGINT on process 0: saved" in ranks[0].err
    assert limbeck(["status", str(tmp_path / "tiny")]) == 75


@pytest.mark.parametrize("moment", ["tokenizing", "export"])
def test_outside_of_training_a_signal_ends_it_at_once(write_experiment, tmp_path, moment):
    """What was half done looks like nothing, and is done again."""
    corpus, cache = tmp_path / "corpus", tmp_path / "cache"
    corpus.mkdir()
    for number in range(40 if moment == "tokenizing" else 4):
        (corpus / f"{number}.txt").write_text(f"The {number} cats see {number} dogs.\n" * 2000)
    file = str(write_experiment("tiny", data={"path": str(corpus)}, run={"cache": str(cache)}, training={"steps": 2},
                                report={"sample_tokens": 50}))
    (run,) = start(tmp_path, "--config", file, environments=[{CLIENTS: ""}])  # a client that takes its time
    said = "reading and tokenizing" if moment == "tokenizing" else "step 2/2  held-out"
    until(lambda: said in run.out, said, [run])
    if moment == "export":
        until(lambda: (tmp_path / "tiny" / "checkpoints" / "step-00000002").exists(), "the last save", [run])
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 75, run.err
    assert "stopped by SIGTERM on process 0, outside of training: what was half done is done again" in run.err
    assert "Traceback" not in run.err
    assert limbeck(["status", str(tmp_path / "tiny")]) == 75
    assert not (tmp_path / "tiny" / "student").exists() and not list(cache.glob("*/.*")), "no half of anything is left"
    (run,) = start(tmp_path, "--config", file)
    assert run.end() == 0, run.err
    assert limbeck(["status", str(tmp_path / "tiny")]) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_where_there_is_no_folder_yet_the_first_process_makes_it_for_a_stop(write_experiment, tmp_path, rank):
    """The others are signalled by a launcher also where that one has refused the experiment."""
    file = str(write_experiment())
    (waiting,) = start(tmp_path, "--config", file, environments=[two_ranks()[rank]])
    heeds = 1 << (signal.SIGUSR1 - 1)
    until(lambda: int(re.search(r"SigCgt:\t(\w+)", Path(f"/proc/{waiting.pid}/status").read_text())[1], 16) & heeds,
          "handlers", [waiting])
    os.kill(waiting.pid, signal.SIGTERM)
    assert waiting.end() == 75
    assert (tmp_path / "tiny").exists() == (rank == 0)


def test_a_folder_that_planning_removes_meanwhile_is_made_again_for_the_note(write_experiment, tmp_path, monkeypatch):
    note = signals.EndNote(read_experiment(write_experiment("tiny")).experiment)
    made = Path.mkdir

    def removed_once(self, *how, **more):
        made(self, *how, **more)
        if self == note.folder:
            monkeypatch.setattr(Path, "mkdir", made)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_once)
    assert note.leave("stopped", signals.AGAIN_LATER)
    assert limbeck(["status", str(note.folder)]) == 75
    assert not note.leave("stopped", signals.AGAIN_LATER), "another process was first"


def test_an_end_at_once_leaves_no_temporary_folder(tmp_path):
    """Records of a person's data may be in it."""
    parents = temporary_folder()
    child = os.fork()
    if not child:
        own = temporary_folder()
        (Path(own.name) / "records").write_text("data")
        (tmp_path / "name").write_text(own.name)
        signals.end(signals.AGAIN_LATER)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signals.AGAIN_LATER
    assert not Path((tmp_path / "name").read_text()).exists() and Path(parents.name).exists()


def test_a_mistake_in_going_on_is_the_end_that_status_tells_of(write_experiment, tmp_path, capsys):
    file = str(write_experiment(**QUICK))
    (run,) = start(tmp_path, "--config", file)
    until(lambda: steps_of(tmp_path / "tiny"), "a step", [run])
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == limbeck(["status", "--config", file]) == 75
    done = train_py("--config", file, "memory.budget=1KB")
    assert done.returncode == ended(tmp_path / "tiny")["code"] == 3 and "memory.budget = '1KB'" in done.stderr
    assert limbeck(["status", "--config", file]) == 1
    assert "memory.budget = '1KB'" in capsys.readouterr().out


def test_of_a_launcher_that_dies_its_process_saves(write_experiment, tmp_path):
    """`accelerate launch` of one process passes no signal on: it is gone, and its process notices."""
    file = str(write_experiment(**{**QUICK, "training": {**QUICK["training"], "steps": 100_000}}))
    launcher = subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                                 str(ROOT / "launch" / "one_process.yaml"), str(ROOT / "train.py"), "--config", file],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 200
    while not steps_of(tmp_path / "tiny") and time.monotonic() < deadline:
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0
    while limbeck(["status", str(tmp_path / "tiny")]) != 75 and time.monotonic() < deadline:
        time.sleep(0.1)
    found = ended(tmp_path / "tiny")
    assert found["signal"] == "the end of its launcher" and found["step"] > 0
    assert (tmp_path / "tiny" / "checkpoints" / f"step-{found['step']:08d}").exists()


def test_slurm_queues_again_what_was_stopped(write_experiment, tmp_path):
    """Slurm signals the shell around each launcher, a while before the time is over; two nodes are this machine."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "scontrol").write_text(f'#!/bin/sh\ncase $1 in show) echo 127.0.0.1 ;; *) echo "$@" > {tmp_path}/asked\n'
                                    'esac\n')
    (stubs / "srun").write_text(f'#!/bin/bash\nshift\nSLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@" & one=$!\n'
                                f'echo $one $other > {tmp_path}/tasks\nwait $one; first=$?\nwait $other\nexit $first\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "4711", "MASTER_PORT": port, "LIMBECK_ROOT": str(ROOT),
        "PATH": os.pathsep.join((str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]))}
    file = str(write_experiment(**{**QUICK, "training": {**QUICK["training"], "steps": 100_000}}))
    job = subprocess.Popen([str(ROOT / "launch" / "slurm.sh"), "--config", file], cwd=ROOT, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while not steps_of(tmp_path / "tiny") and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 75, said[-4000:]
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "by SIGTERM on process" in said and ": saved; start the same command again to go on" in said
    assert "stopped at step" in said.splitlines()[-2], "the run's own state comes last"


CALLED = """
import signal, sys, limbeck
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
try:
    limbeck.run(limbeck.read_experiment(sys.argv[1]))
except limbeck.Stopped as error:
    print(type(error).__name__, error, flush=True)
print([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before)
"""


def _by_a_program(arguments: list[str]) -> None:
    sys.argv = ["program", *arguments]
    exec(CALLED, {})  # noqa: S102 - a program that calls the library


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_program_that_calls_the_library_loses_no_step(write_experiment, tmp_path, name):
    """It has no handlers of its own; the run is saved, the program told, and the same call goes on to the same end."""
    settings = {**QUICK, "training": {**QUICK["training"], "steps": 40}}
    whole, cut = (str(write_experiment(one, **settings)) for one in ("whole", "cut"))

    def called(file: str, number: int) -> Started:
        said = [tmp_path / f"called-{number}-{stream}" for stream in ("stdout", "stderr")]
        process = FORKED.Process(target=_leader, args=(with_clients({}), str(ROOT), said, _by_a_program, ([file],)))
        process.start()
        return Started(process, said)

    assert called(whole, 0).end() == 0
    stopped = called(cut, 1)
    until(lambda: len(steps_of(tmp_path / "cut")) > 2, "in training", [stopped])
    os.kill(stopped.pid, signal.Signals[name])
    assert stopped.end() == 0, stopped.err
    done = steps_of(tmp_path / "cut")
    assert f"Stopped cut: stopped at step {done[-1]} by {name}" in stopped.out and stopped.out.endswith("True\n")
    assert done[-1] < 40 and (tmp_path / "cut" / "checkpoints" / f"step-{done[-1]:08}").is_dir()
    assert called(cut, 2).end() == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_signal_after_the_last_step_does_what_it_does_by_default():
    told, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt), signals.defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            told.append(signals.asked())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["SIGINT"] and signals.asked() is None


def test_handlers_are_put_back_and_people_keep_theirs():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    told = []
    with signals.handle_signals(lambda name, code: told.append((name, code))):
        assert signals.asked() is None
        with pytest.raises(ValueError), signals.defer_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 5
            while signals.asked() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked() == "SIGUSR1", "the first one counts"
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            child.terminate()
            child.join(10)
            assert child.exitcode == -signal.SIGTERM, "a forked process hears signals as any does"
            raise ValueError
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signals.asked() is None and not told
    found = []

    def elsewhere():
        with signals.handle_signals(lambda name, code: None), signals.defer_signals():
            found.append([signal.getsignal(number) for number in signals.SIGNALS])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before], "outside of the main thread nothing is set"


def test_status_of_what_is_no_run_or_ended_without_a_word(train_here, tmp_path, capsys):
    assert limbeck(["status", str(tmp_path / "none")]) == 2
    assert "this is not a run folder" in capsys.readouterr().err
    folder = train_here("half", until=3, training={"checkpoint_every": 2}).folder
    assert limbeck(["status", str(folder.path)]) == 1
    said = capsys.readouterr().out
    assert "running; newest checkpoint step-00000002, of 4 steps" in said, "this process holds its lock"
    assert limbeck(["status", "--wrong"]) == 2 and "no such option: --wrong" in capsys.readouterr().err

"""Child processes of a sweep: their logs and devices, and what signals do to them."""

import os
import signal
import sys
import time

import pytest

from trainer.distributed.signals import APART
from trainer.sweep.jobs import Jobs, last_words, visible_devices, was_stopped

# Says what it is given; ends with 75 at a SIGTERM and with 130 at a SIGINT after it, as a run does.
CHILD = """
import os, signal, sys, time
def end(number, frame):
    if number == signal.SIGTERM and "stubborn" in sys.argv:
        print("saving", flush=True)
    else:
        os._exit({signal.SIGTERM: 75, signal.SIGINT: 130}[number])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["LIMBECK_SWEEP"], os.getsid(0) == os.getpid(), flush=True)
if "fail" in sys.argv:
    sys.exit("error: it is wrong\\n  -> mend it")
if "raise" in sys.argv:
    raise KeyError("a")
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if sys.argv[1:] != ["end"] else 0)
"""


def start(jobs, tmp_path, *words):
    script = tmp_path / "child.py"
    if not script.exists():  # a child that is starting reads it
        script.write_text(CHILD)
    log = tmp_path / "logs" / f"{len(jobs.running)}-{''.join(words)}.log"
    jobs.start(words, [sys.executable, str(script), *words], log)
    return log


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(jobs, count):
    found = []
    while len(found) < count:
        found += jobs.ended()
    return found


def test_each_job_has_a_gpu_in_turn_and_a_log_that_tells_its_command(tmp_path):
    jobs = Jobs(3, ["GPU-a", "GPU-b"])
    logs = [start(jobs, tmp_path, "end") for _ in range(3)]
    assert not jobs.has_room
    assert [job.process.returncode for job in ended(jobs, 3)] == [0, 0, 0] and jobs.has_room
    for log, device in zip(logs, ("GPU-a", "GPU-b", "GPU-a"), strict=True):
        first, *_, last = log.read_text().splitlines()
        assert first == f"$ {sys.executable} {tmp_path / 'child.py'} end" and last == f"{device} {os.getpid()} True"


def test_what_failed_jobs_said(tmp_path):
    jobs = Jobs(3, [])
    for word in ("fail", "raise", "die"):
        start(jobs, tmp_path, word)
    said = {job.run[0]: last_words(job) for job in ended(jobs, 3)}
    assert said == {"fail": "it is wrong\n  -> mend it", "raise": "KeyError: 'a'",
                    "die": "killed by SIGKILL (too little memory?)"}


@pytest.fixture
def hears_ctrl_c():
    """Tests that a shell has put into the background are deaf to it, and so would the jobs be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_reach_the_jobs_once_and_a_second_ctrl_c_ends_them(tmp_path, hears_ctrl_c):
    jobs = Jobs(2, [])
    logs = [start(jobs, tmp_path, "wait"), start(jobs, tmp_path, "stubborn")]
    until(lambda: all("None" in log.read_text() for log in logs))
    with jobs.forwarding():
        signal.raise_signal(signal.SIGTERM)
        assert jobs.asked == "SIGTERM" and not jobs.has_room
        [first] = ended(jobs, 1)
        assert first.run == ("wait",) and first.process.returncode == 75 and was_stopped(first, asked=False)
        until(lambda: "saving" in logs[1].read_text())
        time.sleep(APART)
        signal.raise_signal(signal.SIGINT)
        [second] = ended(jobs, 1)
    assert second.process.returncode == 130 and was_stopped(second, asked=True) and jobs.at_once
    assert logs[1].read_text().count("saving") == 1


def test_gpus_are_those_that_this_process_may_use(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"  # only whether it is there counts; without a GPU torch counts none
    fake.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices() == []

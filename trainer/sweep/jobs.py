"""Child processes of a sweep: one for each run, several at a time, which are told to stop when the sweep is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from trainer.distributed.signals import AGAIN_LATER, APART, AT_ONCE, SIGNALS, SWEEP

LOOK = 0.1  # seconds between looks at the children
MOST_SAID = 1500  # characters of a message that a run ended with


class Process(Protocol):
    """What is needed of a process: the part of `subprocess.Popen` that is used here."""

    returncode: int

    def poll(self) -> int | None:
        """The exit code, None while it runs; negative for a signal."""

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""


Spawn = Callable[[Sequence[str], dict[str, str], IO[str]], Process]


def start_process(command: Sequence[str], environment: dict[str, str], log: IO[str]) -> Process:
    """Start a command in a session of its own, with all it prints in the log."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                            start_new_session=True)


@dataclass
class Job:
    """A run in a process of its own.

    Attributes:
        run: what is run, of any kind.
        process: its process.
        log: its log file, and the size of that before this start.
        slot: number of the job among those at a time.
        since: when it was started, by `time.monotonic`.
    """

    run: Any
    process: Process
    log: tuple[Path, int]
    slot: int
    since: float


class Jobs:
    """Starts runs as processes, and forwards signals to them.

    Each has a session of its own, so that a Ctrl-C reaches it by way of this process alone, and just once. It learns of
    the end of this process, even by SIGKILL, from its parent's number, and then saves and ends (`signals.SWEEP`).

    Args:
        most: number of jobs at a time.
        devices: names of the GPUs, as CUDA_VISIBLE_DEVICES has them; each job gets one, in turn.
        spawn: starts a process from its command, environment and log.

    Attributes:
        asked: name of the signal that asked the sweep to stop, or None.
        at_once: whether a second Ctrl-C asked it to stop at once.
    """

    def __init__(self, most: int, devices: Sequence[str], spawn: Spawn = start_process) -> None:
        self.most, self._devices, self._spawn = most, devices, spawn
        self.running: list[Job] = []
        self.asked: str | None = None
        self.at_once, self._since = False, 0.0

    @property
    def has_room(self) -> bool:
        """Whether another run may start now."""
        return self.asked is None and len(self.running) < self.most

    def start(self, run: Any, command: Sequence[str], log: Path) -> None:
        """Start a run; what it prints is appended to its log."""
        slot = min({*range(self.most)} - {job.slot for job in self.running})
        environment = {**os.environ, SWEEP: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(f"$ {shlex.join(command)}\n")
            handle.flush()
            begin = handle.tell()
            process = self._spawn(command, environment, handle)
        self.running.append(Job(run, process, (log, begin), slot, time.monotonic()))
        if self.asked is not None:  # by a signal that came while the process was being started
            _send(process, signal.SIGTERM)

    def ended(self) -> Iterator[Job]:
        """Jobs that have ended since the last look; waits a moment for one."""
        time.sleep(LOOK)
        for job in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(job)
            yield job

    def hear(self, number: int, frame: Any = None) -> None:
        """Signal handler: ask all children to save and end, or to end at once at a second Ctrl-C."""
        name = signal.Signals(number).name
        if self.asked is None:
            self.asked, self._since = name, time.monotonic()
            print(f"{name}: stopping, {len(self.running)} running; Ctrl-C stops at once", file=sys.stderr, flush=True)
            for job in self.running:
                _send(job.process, signal.SIGTERM)
        elif name == "SIGINT" and time.monotonic() - self._since > APART:
            self.at_once = True
            for job in self.running:
                _send(job.process, signal.SIGINT)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Context manager in which signals to this process are forwarded; what it was started to ignore stays so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.hear) for number in SIGNALS
                  if signal.getsignal(number) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _send(process: Process, number: int) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def was_stopped(job: Job, asked: bool) -> bool:
    """Whether a job ended because of a signal that leaves it to go on later; `asked` if the sweep was told to stop."""
    early = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)  # before it listens to signals
    return job.process.returncode in (AGAIN_LATER, AT_ONCE) or (asked and job.process.returncode in early)


def last_words(job: Job) -> str:
    """What a failed job said about its end: its error message, else the last line of a traceback, else its code."""
    log, begin = job.log
    with log.open("rb") as handle:
        handle.seek(max(begin, log.stat().st_size - 2**16))
        text = handle.read().decode("utf-8", "replace")
    code = job.process.returncode
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (too little memory?)" if code == -signal.SIGKILL else "")
    if found := re.search(r"^error: (?:.|\n)*", text, re.MULTILINE):
        return found[0].removeprefix("error: ").strip()[:MOST_SAID]
    lines = text.strip().splitlines()
    return lines[-1][:MOST_SAID] if lines else f"ended with code {code} and without a word"


def visible_devices() -> list[str]:
    """Names of the GPUs that runs can be given, as CUDA_VISIBLE_DEVICES has them; none without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    script = "import torch; print(torch.cuda.device_count())"  # in a process of its own, which gives its memory back
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    count = int(done.stdout) if done.stdout.strip().isdigit() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

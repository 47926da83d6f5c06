"""Processes to be killed: forked from one that has imported what they need, or launched as a person would."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "two_cpu_ranks.sh"
ON_CPU = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
          "ACCELERATE_USE_CPU": "true"}
MARK = "LIMBECK_FAULTS_START"  # an environment variable by which a launcher's processes are known, orphans too
BEGAN, STEP = re.compile(r"resumed at step (\d+)|\bstep (\d+)/"), re.compile(r"\bstep (\d+)/\d+")
LOOK = 0.001  # seconds between looks at a folder or a process
# To start a process, multiprocessing asks for the exit codes of all others, and each can be read only once.
ONE_AT_A_TIME = threading.Lock()
FORKED = multiprocessing.get_context("forkserver")
NEEDED = ["trainer.cli", "trainer.pipeline", "transformers.trainer", "transformers.models.gpt_neox.modeling_gpt_neox"]


class Started:
    """A start of a program, whose output goes to the file `log`."""

    log: Path
    every: ClassVar[list[Started]] = []  # that were ever started here

    def code(self) -> int | None:
        """Exit code once every process has ended: the first that is not 0, else 0; None before."""
        raise NotImplementedError

    def pid(self, rank: int) -> int | None:
        """The process of a rank, where it is there."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to every process at once, and wait until they are gone."""
        raise NotImplementedError

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def began(self) -> int | None:
        """The step it went on from, 0 for a fresh start; None where it has not said so."""
        match = BEGAN.search(self.text())
        if match is None:
            return None
        return int(match[1]) if match[1] else int(match[2]) - 1

    @property
    def reached(self) -> int:
        """The last step it has logged; 0 where there is none."""
        return max((int(step) for step in STEP.findall(self.text())), default=0)

    def pause(self, seconds: float) -> None:
        """Let it run on for so long, or to its end."""
        self.until(lambda: False, seconds)

    def until(self, true: Callable[[], object], seconds: float) -> bool:
        """Wait until something is true: False where the processes ended, or the seconds went by, before it was."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline or self.code() is not None:
                return False
            time.sleep(LOOK)
        return True

    def wait(self, seconds: float) -> int | None:
        """Exit code, or None after so many seconds: then everything is killed."""
        self.pause(seconds)
        code = self.code()
        self.kill()
        return code


class Forked(Started):
    """Ranks forked from a process that has imported everything: seconds sooner. No launcher looks after them."""

    def __init__(self, script: Path, arguments: Sequence[str], log: Path, processes: int = 1) -> None:
        self.log = log
        group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(_free_port())} if processes > 1 else {}
        self._ranks = []
        for rank in range(processes):
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {}
            process = FORKED.Process(target=_run, args=(str(script), list(arguments), {**os.environ, **ON_CPU, **own},
                                                        str(log)))
            with ONE_AT_A_TIME:
                process.start()
            self._ranks.append(process)
        Started.every.append(self)

    def code(self) -> int | None:
        codes = [self._code(process) for process in self._ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def pid(self, rank: int) -> int | None:
        return self._ranks[rank].pid if self._code(self._ranks[rank]) is None else None

    def kill(self) -> None:
        for process in self._ranks:
            if self._code(process) is None:
                _kill_group(process.pid)
        for process in self._ranks:
            while self._code(process) is None:
                time.sleep(LOOK)
            _kill_group(process.pid)  # what it had started itself

    @staticmethod
    def _code(process: multiprocessing.process.BaseProcess) -> int | None:
        with ONE_AT_A_TIME:
            return process.exitcode


class Launched(Started):
    """A script under `accelerate launch`, on two CPU ranks by launch/two_cpu_ranks.sh, or as one process."""

    def __init__(self, script: Path, arguments: Sequence[str], log: Path, processes: int = 2) -> None:
        self.log, self.script, self.mark = log, script, uuid.uuid4().hex
        self._ranks: dict[int, psutil.Process] = {}  # those that were found
        command = [str(LAUNCHER)] if (script, processes) == (ROOT / "train.py", 2) else [
            sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0",
            "--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else []), str(script)]
        environment = {**os.environ, **ON_CPU, MARK: self.mark,
                       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with log.open("a") as output:
            self._launcher = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=output,
                                              stderr=subprocess.STDOUT, start_new_session=True)
        Started.every.append(self)

    def code(self) -> int | None:
        return self._launcher.poll()

    def pid(self, rank: int) -> int | None:
        if rank not in self._ranks:
            self._find()
        process = self._ranks.get(rank)
        with suppress(psutil.Error):
            if process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return process.pid
        return None

    def kill(self) -> None:
        for process in self._own():
            with suppress(psutil.Error):
                process.kill()
        self._launcher.wait()

    def _find(self) -> None:
        for process in self._own():
            with suppress(psutil.Error):
                if str(self.script) in process.cmdline() and "RANK" in process.environ():
                    self._ranks.setdefault(int(process.environ()["RANK"]), process)

    def _own(self) -> Iterator[psutil.Process]:
        """Its processes, the oldest first."""
        for process in sorted(psutil.process_iter(["create_time"]), key=lambda one: one.info["create_time"] or 0):
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    yield process


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What a forked process does: the script, as `python SCRIPT ARGUMENTS` would."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(ROOT)
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _kill_group(pid: int) -> None:
    """SIGKILL to a process's group, or to itself where it has not made one yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
            return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

"""What a run is doing now: `.status.json`, written by its main process while it lives, and read by anyone.

Readers need no lock and no signal from the run's machine, so that they may be on another one: the file's time is
renewed every few seconds, and a run whose file has grown old is dead.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.run.folder import RunFolder
from trainer.run.working import going, listeners, warnings

# Both are hidden: a run that is being planned, or that is stopped early, has no other file in its folder yet.
STATUS, ENDED = ".status.json", ".ended.json"
BEAT = 5.0  # seconds between signs of life
LOOK = 0.5  # seconds between looks at whether something else is being done
DEAD = 120.0  # seconds without a sign of life after which a run counts as dead; clocks of two machines may differ a bit
AGAIN_LATER = 75  # exit code: EX_TEMPFAIL of BSD's sysexits.h


class RunStatus:
    """Context manager that keeps `.status.json` of a run while the run lives, on the main process.

    A folder of another experiment, or one that another run is using, is not touched. A folder that is made for the file
    goes with it, if nothing else has come into it: an experiment that is refused leaves nothing behind.

    Args:
        name: of the experiment.
        check: raises `UserError` if the folder is not this experiment's and cannot become so.
    """

    def __init__(self, name: str, folder: RunFolder, check: Callable[[], None]) -> None:
        self.name, self.folder, self.file, self._check = name, folder, folder.path / STATUS, check
        self._over, self._thread, self._made = threading.Event(), None, []
        self._written: dict[str, Any] = {}
        self._beaten, self._lock = 0.0, threading.Lock()

    def __enter__(self) -> RunStatus:
        if int(os.environ.get("RANK", 0)) == 0 and self._belongs():
            path = self.folder.path
            self._over.clear()
            self._written = {}
            self._made = [one for one in (path, *path.parents) if not one.exists()]  # deepest first
            with suppress(OSError):
                path.mkdir(parents=True, exist_ok=True)
            self.beat()
            listeners.append(self.beat)
            self._thread = threading.Thread(target=self._beats, daemon=True, name="signs of life")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._over.set()
        listeners.remove(self.beat)
        self._thread.join()
        self._thread = None
        with suppress(OSError):
            if self._written:
                self.file.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()

    def beat(self) -> None:
        """Write what is being done if that has changed, else renew the file's time; a full disk is no reason to end."""
        with self._lock, suppress(OSError):
            if not self._written and _others(self.folder):
                return
            now, content = time.monotonic(), self.content()
            same = {**content, **{key: self._written.get(key) for key in ("done", "total", "unit")}} == self._written
            if same and now - self._beaten < BEAT:
                return
            self._beaten = now
            if content == self._written:
                os.utime(self.file)
            else:
                write_atomically(self.file, json.dumps(content) + "\n")
                self._written = content

    def content(self) -> dict[str, Any]:
        """What the file holds, as plain data."""
        works = going()
        facts = {key: value for work in works for key, value in work.facts.items()}
        if "folder" in facts:
            facts["folder"] = os.path.relpath(facts["folder"], self.folder.path)
        last = works[-1] if works else None
        return {"name": self.name, "host": socket.gethostname(), "pid": os.getpid(), "model": facts.get("model"),
                "folder": facts.get("folder", "."), "doing": "starting" if last is None else last.short,
                "since": None if last is None else last.began, "done": last and last.done, "total": last and last.total,
                "unit": last and last.unit, "warnings": list(warnings)}

    def _belongs(self) -> bool:
        try:
            self._check()
        except (UserError, OSError):
            return False
        return True

    def _beats(self) -> None:
        while not self._over.wait(LOOK):
            self.beat()


def _others(folder: RunFolder) -> bool:
    """Whether another process seems to run in the folder; once this one has locked it, none does."""
    life = Life.of(folder)
    return not folder.locked and (life.lives and life.pid != os.getpid() or in_use(folder.path))


def check_free(folder: RunFolder) -> None:
    """Raise `OtherRun` if another process runs in the folder, before anything is read or planned.

    A process that has not locked the folder yet is found by its signs of life, on this machine only: one that died with
    another machine would keep its folder for minutes.
    """
    life = Life.of(folder)
    if not folder.locked and (in_use(folder.path) or life.lives and life.pid not in (None, os.getpid())):
        raise folder.busy()


# ---- for those who look at a run

@dataclass(frozen=True)
class Life:
    """What a run's folder says about the process that writes it.

    Attributes:
        content: of `.status.json`; {} if there is none.
        age: seconds since the last sign of life; None if there is none.
        gone: whether the process is known to be gone, which only its own machine can tell.
    """

    content: dict[str, Any]
    age: float | None
    gone: bool

    @classmethod
    def of(cls, folder: RunFolder) -> Life:
        """Read the file; opened anew each time, since a network file system looks at its server only then."""
        try:
            with (folder.path / STATUS).open(encoding="utf-8") as handle:
                content, time_of = json.loads(handle.read(100_000)), os.fstat(handle.fileno()).st_mtime
        except (OSError, ValueError, RecursionError):
            return cls({}, None, False)
        if not isinstance(content, dict):
            return cls({}, None, False)
        return cls(content, max(0.0, time.time() - time_of), _gone(content))

    @property
    def pid(self) -> int | None:
        """The main process, if it is on this machine."""
        pid = self.content.get("pid")
        return pid if isinstance(pid, int) and self.content.get("host") == socket.gethostname() else None

    @property
    def lives(self) -> bool:
        """Whether the run goes on, as far as can be told."""
        return self.age is not None and self.age < DEAD and not self.gone

    @property
    def training(self) -> Path:
        """The folder, relative to the run's, of the model that is being made."""
        folder = self.content.get("folder")
        return Path(folder if isinstance(folder, str) else ".")

    @property
    def phase(self) -> str:
        """What is being done, and of which model: "control: training"."""
        model, doing = self.content.get("model"), self.content.get("doing")
        return ": ".join(part for part in (model, doing) if isinstance(part, str))


def _gone(content: dict[str, Any]) -> bool:
    pid = content.get("pid")
    if content.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's process
        return False
    return False


def status(path: Path) -> tuple[str, int]:
    """Describe the state of a run, with an exit code: 0 if finished, 75 if stopped by a signal, else 1.

    Raises:
        UserError: there is no such run.
    """
    folder = RunFolder(path)
    life, end = Life.of(folder), how_it_ended(folder)
    check_run(folder)
    if end is None and (life.lives or not folder.finished and in_use(folder.path)):
        phase = f", {life.phase}" if life.lives and life.phase else ""
        return f"{path}: running{phase}; {_reached(RunFolder(path / life.training))}", 1
    if folder.finished:
        return f"{path}: finished, see {folder.report}", 0
    if end is None:
        return f"{path}: ended without a word, and not finished; {_reached(folder)}", 1
    return f"{path}: {end['said']}\n  {_reached(folder)}", AGAIN_LATER if end["code"] == AGAIN_LATER else 1


def check_run(folder: RunFolder) -> None:
    """Raise `UserError` if the folder is not that of a run, begun or ended."""
    if how_it_ended(folder) is None and not folder.experiment.exists() and not (folder.path / STATUS).exists():
        raise UserError("", "this is not a run folder", value=str(folder.path), way_out="name one, for example "
                        "runs/NAME, or the experiment it is of: --config FILE")


def newest_checkpoint(folder: RunFolder) -> str | None:
    """Name of the newest checkpoint in a run folder, whether or not it is intact."""
    return max((one.name for one in folder.checkpoints.glob("step-*")), default=None)


def how_it_ended(folder: RunFolder) -> dict[str, Any] | None:
    """The note of how a run ended; None if it has not, or not in a way that leaves one."""
    end = read_lenient(folder.path / ENDED)
    return end if isinstance(end.get("said"), str) and isinstance(end.get("code"), int) else None


def read_lenient(file: Path) -> dict[str, Any]:
    """Read a JSON file; {} if it is missing, unreadable, or just being written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with (folder / ".lock").open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _reached(folder: RunFolder) -> str:
    newest, steps = newest_checkpoint(folder), read_lenient(folder.plan).get("steps")
    reached = "no checkpoint yet" if newest is None else f"newest checkpoint {newest}"
    return reached + (f", of {steps:,} steps" if isinstance(steps, int) else "")

"""How a run is asked to end, and what it leaves behind of its end.

Schedulers send SIGTERM or SIGUSR1 a while before they kill, people press Ctrl-C. While a student trains, a signal is
only remembered: the processes agree on it in a sum that they make in every step, save, and end with code 75, on which
schedulers queue again. Before and after training a signal ends its process at once, since nothing half done there is
ever taken for done.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.run.folder import RunFolder

AGAIN_LATER, AT_ONCE = 75, 130  # EX_TEMPFAIL of BSD's sysexits.h; what shells make of SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
APART = 0.5  # seconds: what comes sooner after a Ctrl-C is the same one, passed on by a launcher
GRACE = 3.0  # seconds that the main thread has to clear away what is half done
LOOK = 1.0  # seconds between looks whether the launcher is still there
ENDED = ".ended.json"  # hidden: a run that is stopped early has no other file in its folder yet
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and torchrun


class Leaving(BaseException):
    """Raised in the main thread where a signal ends the process at once, so that temporary files are removed."""


class Signals:
    """The signals that this process gets while it runs an experiment.

    A thread hears them. Python calls handlers in the main thread alone, and not while that waits for other processes.

    Args:
        tell: says that the process ends at once; it is given the signal's name and the exit code.

    Attributes:
        asked: what asks the run to end at the next boundary of steps, if anything does.
        training: whether a signal waits for such a boundary.
        over: whether the run has ended otherwise, so that signals mean nothing any more.
        cleared: set when the main thread has left everything that it was in.
    """

    def __init__(self, tell: Callable[[str, int], None]) -> None:
        self.asked: str | None = None
        self.training = self.over = False
        self.cleared = threading.Event()
        self._tell, self._since = tell, 0.0

    def leave(self, name: str, code: int) -> NoReturn:
        """End the process."""
        self._tell(name, code)
        if code == AGAIN_LATER:
            self.cleared.wait(GRACE)
        end(code)

    def hear(self, name: str) -> None:
        """Remember a signal while there is training, end the process otherwise."""
        if self.over:
            return
        if not self.training:
            self.leave(name, AGAIN_LATER)
        elif self.asked is None:
            self.asked, self._since = name, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"{name}: stopping at the next step, Ctrl-C stops at once", file=sys.stderr, flush=True)
        elif name == "SIGINT" and time.monotonic() - self._since > APART:
            self.leave(name, AT_ONCE)

    def listen(self, wire: socket.socket) -> None:
        """Hear what Python's own handler writes to a wire, until it is a 0."""
        launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        wire.settimeout(LOOK)
        while True:
            numbers = b""
            with suppress(TimeoutError):
                numbers = wire.recv(64)
            if 0 in numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self.hear(signal.Signals(number).name)
            if launcher not in (None, os.getppid()):  # `accelerate launch` of one process passes no signal on
                self.hear("the end of its launcher")


_heard: Signals | None = None


@contextmanager
def handle_signals(tell: Callable[[str, int], None]) -> Iterator[None]:
    """Hear signals within, for `asked` and `defer_signals`; outside of the main thread nothing is changed.

    Handlers are put back afterwards. A signal that the process was started to ignore stays ignored. `tell` is for those
    that end the process at once: see `Signals`.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    _heard = Signals(tell)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes meanwhile waits until it can be caught
    before = {number: signal.signal(number, _in_main_thread) for number in SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}
    wire = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_heard.listen, args=(ours,), name="signals", daemon=True)
    thread.start()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
        _heard.over = True  # here already: a signal until now is caught below, in `finally` it would not be
    except Leaving:
        _heard.cleared.set()
        thread.join(GRACE)  # it ends the process
        _heard.leave(_heard.asked or "a signal", AGAIN_LATER)  # unless it heard the signal when there was training
    finally:
        _heard.over = True
        signal.set_wakeup_fd(wire)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        pythons.send(b"\0")
        thread.join()
        ours.close()
        pythons.close()
        _heard = None


def asked() -> str | None:
    """What asks this process to end at the next boundary of steps, if anything does."""
    return None if _heard is None else _heard.asked


@contextmanager
def defer_signals() -> Iterator[None]:
    """Within, a signal is only remembered, for whoever looks at `asked` between steps."""
    heard = _heard
    if heard is None:
        yield
        return
    heard.training = True
    try:
        yield
    except BaseException:
        heard.over = True  # what ends the run has its own words and code; a launcher signals the others then
        raise
    heard.training = False
    if heard.asked is not None:
        heard.cleared.set()
        heard.leave(heard.asked, AGAIN_LATER)


@contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Processes that are forked within get no signal of their group: whoever forked them decides when they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _heard is not None else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(code: int) -> NoReturn:
    """End the process from any thread, whatever the others wait for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _in_main_thread(number: int, frame: Any) -> None:
    """The thread hears of the signal by itself, and goes on when this one has cleared away, or does not."""
    if _heard is not None and not _heard.training and not _heard.over and not _heard.cleared.is_set():
        raise Leaving


_masks: list[set[signal.Signals]] = []  # of the thread that is forking


def _forking() -> None:
    """A signal that comes to a child before it has handlers of its own has to wait for these."""
    if _heard is not None:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _forked() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forked_off() -> None:
    """A forked child hears nothing on its parent's wire, and ends by a signal as processes do."""
    global _heard
    if _heard is not None:
        _heard = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _forked()


os.register_at_fork(before=_forking, after_in_parent=_forked, after_in_child=_forked_off)


# ---- what a run leaves behind of its end

class EndNote:
    """What a run leaves in its folder of how it ended, for whoever looks later.

    Args:
        experiment: whose folder it is; another experiment's is left alone.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.folder = experiment, Path(experiment.folder)

    def begin_again(self) -> None:
        """Forget how the run ended before."""
        if int(os.environ.get("RANK", 0)) == 0 and self._is_own():
            with suppress(OSError):
                (self.folder / ENDED).unlink(missing_ok=True)

    def leave(self, said: str, code: int, **more: Any) -> bool:
        """Write how the run ended; False where another process was first, which then tells it.

        A folder that is not there yet is made for a stop alone, which is to be known of, and by the first process: a
        launcher signals the others also where that one has refused the experiment, which is to leave nothing.
        """
        makes = code == AGAIN_LATER and int(os.environ.get("RANK", 0)) == 0
        if not self._is_own() or not (makes or self.folder.exists()):
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ENDED).open("x", encoding="utf-8") as handle:
                json.dump({"code": code, **more, "said": said}, handle)
        except FileExistsError:
            return False
        except OSError:  # a full disk: it is said all the same
            return True
        return True

    def wait(self, seconds: float) -> None:
        """Wait until the first process has left its note, and no longer: launchers end it when another ends."""
        deadline = time.monotonic() + seconds
        while not (self.folder / ENDED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _is_own(self) -> bool:
        try:
            RunFolder(self.folder).check(self.experiment)
        except (UserError, OSError):
            return False
        return True


def status(path: Path) -> tuple[str, int]:
    """The state of a run in words, and an exit code: 0 where it is finished, 75 where it was asked to stop, or 1.

    Raises:
        UserError: there is no such run.
    """
    folder = RunFolder(path)
    end = _how_it_ended(folder)
    if end is None and not folder.experiment.exists():
        raise UserError("", "this is not a run folder", value=str(path), way_out="name one, for example runs/NAME, "
                        "or the experiment: limbeck status --config FILE")
    if folder.finished:
        return f"{path}: finished, see {folder.report}", 0
    newest = max((one.name for one in folder.checkpoints.glob("step-*")), default=None)
    steps = _read(folder.plan).get("steps")
    reached = "no checkpoint yet" if newest is None else f"newest checkpoint {newest}"
    reached += "" if steps is None else f", of {steps:,} steps"
    if _in_use(folder):
        return f"{path}: running; {reached}", 1
    if end is None:
        return f"{path}: ended without a word, and not finished; {reached}", 1
    return f"{path}: {end['said']}\n  {reached}", AGAIN_LATER if end["code"] == AGAIN_LATER else 1


def _how_it_ended(folder: RunFolder) -> dict[str, Any] | None:
    end = _read(folder.path / ENDED)
    return end if isinstance(end.get("said"), str) and isinstance(end.get("code"), int) else None


def _read(file: Path) -> dict[str, Any]:
    """A JSON file that may be missing, or be written at this moment."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(folder: RunFolder) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with (folder.path / ".lock").open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

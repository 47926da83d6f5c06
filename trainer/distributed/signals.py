"""Graceful stop on signals, and the note in the run folder of how a run ended.

Schedulers send SIGTERM or SIGUSR1 some time before they kill a job; users press Ctrl-C. During training, a signal is
only recorded: the processes agree on it in an all-reduce that they do at every step anyway, save a checkpoint, and exit
with code 75, on which schedulers requeue the job. Before and after training, a signal ends its process at once, since
incomplete work there is never mistaken for complete.

A program that calls `limbeck.run` itself keeps its handlers. Where it has none, signals are recorded during training
all the same, a checkpoint is saved, and the program gets `Stopped`.
"""

from __future__ import annotations

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

from trainer.data.temporary_folder import remove_folders
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.run.folder import RunFolder
from trainer.run.run_status import AGAIN_LATER, ENDED

AT_ONCE = 130  # exit code: the shell's for SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
APART = 0.5  # seconds; a SIGINT that follows sooner is the same Ctrl-C, forwarded by a launcher
GRACE = 3.0  # seconds for the main thread to clean up incomplete work
LOOK = 1.0  # seconds between checks that the launcher is still alive
SWEEP = "LIMBECK_SWEEP"  # set by a sweep for its runs: the number of its process
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and torchrun


class Leaving(BaseException):
    """Raised in the main thread when a signal ends the process at once, so that temporary files are removed."""


class Signals:
    """Handles the signals that this process receives while it runs an experiment.

    A thread receives them, since Python runs signal handlers only in the main thread, and not while that waits in a
    collective.

    Args:
        tell: reports that the process ends at once; called with the name of the signal and the exit code.

    Attributes:
        asked: name of the signal that asks the run to stop after the present step, or None.
        training: whether signals are deferred to the end of a step.
        over: whether the run has already ended in another way, so that signals are ignored.
        cleared: set once the main thread has unwound its stack.
    """

    def __init__(self, tell: Callable[[str, int], None]) -> None:
        self.asked: str | None = None
        self.training = self.over = False
        self.cleared = threading.Event()
        self._tell, self._since = tell, 0.0

    def leave(self, name: str, code: int) -> NoReturn:
        """Report the signal, and end the process; unless code is `AT_ONCE`, give the main thread time to clean up."""
        self._tell(name, code)
        if code == AGAIN_LATER:
            self.cleared.wait(GRACE)
        end(code)

    def hear(self, name: str) -> None:
        """Handle a signal: record it during training, end the process otherwise, or on a second Ctrl-C."""
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
        """Body of the thread: read signal numbers that Python's C handler writes to the wakeup socket, until a 0."""
        launcher = _launcher()
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
            if launcher not in (None, os.getppid()):  # `accelerate launch` with one process forwards no signals
                self.hear("the end of its launcher")


def _launcher() -> int | None:
    """Number of the process whose end this one is to notice; a sweep's own, since the sweep may be gone by now."""
    sweep = os.environ.get(SWEEP, "")
    if sweep.isdecimal():
        return int(sweep)
    return os.getppid() if any(name in os.environ for name in LAUNCHED) else None


_heard: Signals | None = None


@contextmanager
def handle_signals(tell: Callable[[str, int], None]) -> Iterator[None]:
    """Context manager that handles signals inside, for `asked` and `defer_signals`; a no-op outside of the main thread.

    Previous handlers are restored at the end. A signal that the process was started to ignore stays ignored. `tell`
    reports signals that end the process at once, see `Signals`.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    _heard = Signals(tell)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # signals stay pending until the handlers are ready
    before = {number: signal.signal(number, _in_main_thread) for number in SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}
    wire = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_heard.listen, args=(ours,), name="signals", daemon=True)
    thread.start()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
        _heard.over = True  # set before `finally`, in which `Leaving` would no longer be caught
    except Leaving:
        _heard.cleared.set()
        thread.join(GRACE)  # the thread normally ends the process
        _heard.leave(_heard.asked or "a signal", AGAIN_LATER)  # reached if it only recorded the signal, as in training
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
    """Name of the signal that asks this process to stop after the present step, or None."""
    return None if _heard is None else _heard.asked


@contextmanager
def defer_signals() -> Iterator[None]:
    """Context manager in which signals are only recorded, for code that checks `asked` between steps."""
    heard = _heard
    if heard is None:
        with _recorded():
            yield
        return
    heard.training = True
    try:
        yield
    except BaseException:
        heard.over = True  # the error has its own message and exit code; launchers signal the other processes then
        raise
    heard.training = False
    if heard.asked is not None:
        heard.cleared.set()
        heard.leave(heard.asked, AGAIN_LATER)


@contextmanager
def _recorded() -> Iterator[None]:
    """Record signals for a program without `handle_signals`, where it has no handler of its own for them.

    They are recorded between two instructions of the main thread; in another thread nothing is. A second Ctrl-C is
    Python's own. A signal after the last check of `asked` is sent again at the end, for whatever it does by default.
    """
    global _heard
    free = [number for number in SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread() or not free:
        yield
        return
    heard = _heard = Signals(_interrupt)
    heard.training = True
    before = {number: signal.signal(number, lambda number, _: heard.hear(signal.Signals(number).name))
              for number in free}
    try:
        yield
    except BaseException:
        heard.asked = None  # the error tells it, or has ended the training before
        raise
    finally:
        _heard = None
        for number, handler in before.items():
            signal.signal(number, handler)
        if heard.asked is not None:
            signal.raise_signal(signal.Signals[heard.asked])


def _interrupt(name: str, code: int) -> NoReturn:
    raise KeyboardInterrupt(name)


@contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Context manager in which child processes start with signals blocked: the parent decides when they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _heard is not None else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(code: int) -> NoReturn:
    """End the process from any thread, whatever its other threads wait for."""
    with suppress(Exception):  # whatever happens, the process ends
        remove_folders()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _in_main_thread(number: int, frame: Any) -> None:
    """Python-level handler: unwind the main thread by `Leaving`; the signal thread receives the signal separately."""
    if _heard is not None and not _heard.training and not _heard.over and not _heard.cleared.is_set():
        raise Leaving


_masks: list[set[signal.Signals]] = []  # signal masks to restore in the forking thread


def _forking() -> None:
    """Block signals during a fork: one that reaches the child has to wait until its own handlers are set."""
    if _heard is not None:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _forked() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forked_off() -> None:
    """In a forked child, detach from the parent's wakeup socket and restore the default signal handlers."""
    global _heard
    if _heard is not None:
        _heard = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _forked()


os.register_at_fork(before=_forking, after_in_parent=_forked, after_in_child=_forked_off)


# ---- the note of how a run ended

class EndNote:
    """The note in a run folder that records how the run ended.

    Args:
        experiment: the experiment that the folder belongs to; the folder of another one is not touched.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.folder = experiment, Path(experiment.folder)

    def begin_again(self) -> None:
        """Remove the note of an earlier end."""
        if int(os.environ.get("RANK", 0)) == 0 and self._is_own():
            with suppress(OSError):
                (self.folder / ENDED).unlink(missing_ok=True)

    def leave(self, said: str, code: int, **more: Any) -> bool:
        """Write how the run ended; returns False if another process was first, and so is the one to report it.

        A missing folder is created only for a stop, so that the stop is known, and only by rank 0: if rank 0 rejects
        the experiment, which must leave nothing behind, the launcher signals the other processes as well.
        """
        makes = code == AGAIN_LATER and int(os.environ.get("RANK", 0)) == 0
        # While a run is planned its folder may hold the sign that it lives, which goes if the experiment is refused.
        if not self._is_own() or not (makes or RunFolder(self.folder).experiment.exists()):
            return True
        note = json.dumps({"code": code, **more, "said": said})
        try:
            return self._write(note)
        except FileNotFoundError:  # the main thread has left planning meanwhile, and removed a folder that was empty
            with suppress(OSError):
                return self._write(note)
        except OSError:  # for example a full disk: the end is reported all the same
            pass
        return True

    def _write(self, note: str) -> bool:
        """Write the note to the folder, which is created if it is missing; False if there is one already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self.folder / ENDED).open("x", encoding="utf-8") as handle:
                handle.write(note)
        except FileExistsError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Wait for rank 0 to write the note, for at most `seconds`: launchers end it once another process exits."""
        deadline = time.monotonic() + seconds
        while not (self.folder / ENDED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _is_own(self) -> bool:
        try:
            RunFolder(self.folder).check(self.experiment)
        except (UserError, OSError):
            return False
        return True

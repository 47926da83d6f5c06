"""Watchdog for hung or dead processes: reports which rank is missing from which collective, and ends the others.

A collective waits for all processes. If one has died, gloo notices the broken connection, but NCCL notices nothing; if
one is stuck, neither does. So each process announces its place before it waits for others. A thread publishes the place
as a heartbeat every second in the store through which torch's processes found each other, and ends the process once it
has been at one place for too long; nothing else ends a process that waits in a collective.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from trainer.distributed import rendezvous, signals
from trainer.errors import Lost, RunFailed

EVERY = 1.0  # seconds between heartbeats
SILENT = 4.0  # seconds without a heartbeat after which a process counts as dead
STOPPING = 20.0  # the same if this process was asked to stop, as a launcher does after another process has died
QUIET = 10.0  # seconds at one place after which the heartbeats of others are read; before that nobody needs them
OTHERS_WAIT = 5.0  # seconds that other ranks wait, so that one reports first
TALE = 4  # number of processes that are described in full
REACH = timedelta(seconds=15)  # timeout of the store
WAY_OUT = "  -> its checkpoints are good: start the same command again to go on from the newest"


@dataclass(frozen=True)
class Place:
    """The latest heartbeat of a process.

    Attributes:
        beat: counter that increases while the process is alive.
        count: number of places reached so far; a given place has the same number on all processes.
        seconds: time since it reached this place, by its own clock.
        words: name of the place.
        ended: the error that ended it, or "".
    """

    beat: int
    count: int
    seconds: float
    words: str
    ended: str = ""


def diagnosis(own: Place, others: dict[int, Place | None], silent: dict[int, float]) -> str:
    """Describe which processes are missing from the place where this one waits.

    Args:
        own: place of this process.
        others: rank -> latest heartbeat of each other process, None if there was none.
        silent: rank -> seconds since its latest heartbeat arrived.
    """
    missing = missed(own, others, silent)
    lines = [f"process {rank} did not come to {own.words}: {_told(others[rank], silent[rank])}"
             if others[rank] is None or others[rank].count < own.count else
             f"process {rank} is gone from {others[rank].words}: {_told(others[rank], silent[rank])}"
             for rank in missing[:TALE]]
    if len(missing) > TALE:
        lines.append(f"and {len(missing) - TALE} more processes, among {', '.join(map(str, missing[TALE:TALE + 8]))}")
    if lines:
        return "\n  ".join(lines)
    if any(place is not None and place.count > own.count for place in others.values()):
        return f"this process has been at {own.words} for {own.seconds:.0f} s, and the others wait for it"
    return f"all processes are at {own.words}, this one for {own.seconds:.0f} s, and none comes any further"


def missed(own: Place, others: dict[int, Place | None], silent: dict[int, float]) -> list[int]:
    """Ranks of the processes that are behind this one, or dead."""
    return [rank for rank, place in sorted(others.items())
            if place is None or place.count < own.count or place.ended or silent[rank] >= SILENT]


def _told(place: Place | None, silent: float) -> str:
    if place is None:
        return "it was never heard of"
    if place.ended:
        return f"it ended at {place.words}, by {place.ended}"
    if silent >= SILENT:
        return f"it was last seen {silent:.0f} s ago, at {place.words}, and is dead or stopped"
    return f"it is alive, and has been at {place.words} for {place.seconds:.0f} s"


class Watch:
    """Publishes the place of this process to the others, and ends the process if it waits for too long.

    Args:
        rank: rank of this process.
        ranks: number of processes; a single one is not watched.
        timeout: seconds at one place after which the process is ended.
    """

    made = 0  # instances so far; consistent over processes, which create theirs in the same order

    def __init__(self, rank: int, ranks: int, timeout: float) -> None:
        Watch.made += 1
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self._key = f"limbeck/{rendezvous.generation()}/{Watch.made}/{{}}"
        self._here = (0, "the start", time.monotonic())
        self._beat, self._store = 0, None
        self._others: dict[int, Place | None] = {}
        self._news: dict[int, float] = {}  # rank -> time at which its latest heartbeat was first seen
        self._done, self._reading = threading.Event(), False

    def at(self, words: str) -> None:
        """Announce the place this process is about to reach; call before anything that may wait forever."""
        self._here = (self._here[0] + 1, words, time.monotonic())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Context manager that runs the watchdog, and explains errors raised inside.

        Raises:
            Lost: another process was missing from a collective.
            RunFailed: a data worker of this process has died, or DDP found weights that took no part in a step.
        """
        if self.ranks > 1:
            self._store, self._reading = _own_store(), False
            self._others, self._news = {}, {}
            self._done.clear()
            self.at("the first step")
            self._say()
            thread = threading.Thread(target=self._go_on, name="watch", daemon=True)
            thread.start()
        try:
            yield
        except BaseException as error:
            told = self._explained(error)
            self._done.set()
            if self.ranks > 1 and not isinstance(told, Lost):
                thread.join(SILENT)
                first = str(told or error).partition("\n")[0]
                self._say(f"{type(told or error).__name__}: {first}")
            if told is None:
                raise
            raise told from error
        finally:
            self._done.set()

    def _explained(self, error: BaseException) -> RunFailed | None:
        if _of_a_worker(error):
            return RunFailed(f"a process that reads data for this one (data.workers) is gone, at {self._here[1]}: "
                             f"{str(error).partition(chr(10))[0]}\n  -> often the machine's memory is short: set "
                             "data.workers lower; start the same command again to go on from the last checkpoint")
        if "Expected to have finished reduction in the prior iteration" in str(error):
            return RunFailed(f"at {self._here[1]} some of the student's weights had taken no part in the step before, "
                             "as experts that get no token, and `ddp` sums gradients where all do\n"
                             "  -> set sharding.engine to fsdp2, and start the same command again")
        if self.ranks == 1 or not lost(error):
            return None
        self._reading = True
        time.sleep(SILENT + 2 * EVERY)  # until dead processes have been silent for long enough
        first = str(error).partition("\n")[0].partition(" This is typically")[0]
        return Lost(f"{self._diagnosis()}\n  (process {self.rank} was told: {first})\n{WAY_OUT}")

    # ---- the thread

    def _go_on(self) -> None:
        while not self._done.wait(EVERY):
            self._say()
            waited = time.monotonic() - self._here[2]
            stopping_ = signals.asked() is not None
            if self._reading or waited > min(QUIET, self.timeout / 3) or stopping_:
                self._read()
            dead = stopping_ and any(self._silence(rank) > STOPPING for rank in self._others)
            if not self._reading and (waited > self.timeout or (dead and waited > STOPPING)):
                self._end()

    def _place(self, ended: str = "") -> Place:
        count, words, since = self._here
        return Place(self._beat, count, round(time.monotonic() - since, 1), words, ended)

    def _say(self, ended: str = "") -> None:
        self._beat += 1
        try:
            if self._store is not None:
                self._store.set(self._key.format(self.rank), json.dumps(asdict(self._place(ended))))
        except RuntimeError:  # the host of the store is gone; only this process's own timeout is left
            self._store = None

    def _read(self) -> None:
        """Read the latest heartbeats of the other processes."""
        for rank in range(self.ranks):
            if rank == self.rank:
                continue
            place = self._word_of(rank)
            if rank not in self._others or (place is not None and place != self._others[rank]):
                self._others[rank], self._news[rank] = place, time.monotonic()

    def _word_of(self, rank: int) -> Place | None:
        try:
            if self._store is not None and self._store.check([self._key.format(rank)]):
                return Place(**json.loads(self._store.get(self._key.format(rank))))
        except RuntimeError:
            self._store = None
        return None

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self._news[rank]

    def _diagnosis(self) -> str:
        if self._store is None:
            if rendezvous.launchers_store():
                return (f"others did not come to {self._here[1]}; which ones cannot be known, since the launcher, "
                        "which keeps their words, is gone")
            return f"process 0, which keeps the words of all, is gone, while this one was at {self._here[1]}"
        return diagnosis(self._place(), dict(self._others), {rank: self._silence(rank) for rank in self._others})

    def _end(self) -> None:
        """Report who is missing, and end the process from this thread, since its main thread waits in a collective."""
        said = self._diagnosis()
        missing = missed(self._place(), self._others, {rank: self._silence(rank) for rank in self._others})
        if self.rank != min(set(range(self.ranks)) - set(missing), default=0):
            self._done.wait(OTHERS_WAIT)
        who = f"process {self.rank}: " if self.rank else ""
        print(f"{who}error: {said}\n  (it waited for {time.monotonic() - self._here[2]:.0f} s; run.timeout is "
              f"{self.timeout:g} s)\n{WAY_OUT}; if nothing was stuck, and it takes so long, set run.timeout higher",
              file=sys.stderr, flush=True)
        signals.end(1)


def lost(error: BaseException) -> bool:
    """Whether an error comes from a collective whose peer is gone, or did not arrive in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _of_a_worker(error: BaseException) -> bool:
    """Whether an error means that a data worker died: torch noticed it, or it died while handing over a batch."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)) or (
        isinstance(error, OSError | EOFError) and any(name.startswith("multiprocessing.") for name in frames))


def _own_store() -> dist.Store | None:
    """A separate connection to the store of the process group, since torch's own blocks while torch waits in it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, timeout=REACH, wait_for_workers=False)
    return store

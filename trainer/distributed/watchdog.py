"""Where each process is, told to the others, so that one that does not come is missed by name and in time.

A collective waits for all processes. Of one that is gone gloo learns from its broken connection, NCCL not at all, and
of one that is stuck neither does. So each process says where it is before it waits for others; a thread writes that
down every second where all can read it (the store by which torch's processes found each other), and ends the process
when it has been at one place for too long. Nothing else ends one that waits in a collective.
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

EVERY = 1.0  # seconds between words of a process
SILENT = 4.0  # seconds without a word after which a process is taken for dead
STOPPING = 20.0  # the same, where this process was asked to stop: a launcher does so when one of them has died
QUIET = 10.0  # seconds at one place after which the others are read; in between nobody needs them
OTHERS_WAIT = 5.0  # seconds by which the others let one speak first
TALE = 4  # processes told of by number
REACH = timedelta(seconds=15)  # the store has to answer in
WAY_OUT = "  -> its checkpoints are good: start the same command again to go on from the newest"


@dataclass(frozen=True)
class Place:
    """The last word of a process.

    Attributes:
        beat: counts on while the process lives.
        count: places it has come to; the same on all processes for the same one.
        seconds: since it came to this one, by its own clock.
        words: name of the place.
        ended: why it left, if it did.
    """

    beat: int
    count: int
    seconds: float
    words: str
    ended: str = ""


def diagnosis(own: Place, others: dict[int, Place | None], silent: dict[int, float]) -> str:
    """Which processes are missing from the place of this one.

    Args:
        own: where this process is.
        others: last word of every other process by its number; None of one that never gave any.
        silent: seconds since their last words came.
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
    """Numbers of the processes that are behind this one, or dead."""
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
    """Tells the other processes where this one is, and ends it when it waits for too long.

    Args:
        rank: number of this process.
        ranks: number of processes; one alone is not watched.
        timeout: seconds at one place after which the process ends.
    """

    made = 0  # the same on all processes, which make theirs in the same order

    def __init__(self, rank: int, ranks: int, timeout: float) -> None:
        Watch.made += 1
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self._key = f"limbeck/{rendezvous.generation()}/{Watch.made}/{{}}"
        self._here = (0, "the start", time.monotonic())
        self._beat, self._store = 0, None
        self._others: dict[int, Place | None] = {}
        self._news: dict[int, float] = {}  # when each was first seen at its beat
        self._done, self._reading = threading.Event(), False

    def at(self, words: str) -> None:
        """Say where this process is going to be: before it waits for others, or for anything that may not come."""
        self._here = (self._here[0] + 1, words, time.monotonic())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch over what is done within.

        Raises:
            Lost: another process was missing from a collective.
            RunFailed: a process that reads data for this one has died.
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
        time.sleep(SILENT + 2 * EVERY)  # now it shows who is silent
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
        except RuntimeError:  # whoever keeps the store is gone; this process goes on by its own clock
            self._store = None

    def _read(self) -> None:
        """Take in the last words of the others."""
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
        """Say who is missing, and end the process from here: its main thread waits in a collective."""
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
    """Whether an error is a collective's: another process is gone, or did not come in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _of_a_worker(error: BaseException) -> bool:
    """Whether an error is that a data worker died: torch saw its end, or it was to hand a batch over at that moment."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)) or (
        isinstance(error, OSError | EOFError) and any(name.startswith("multiprocessing.") for name in frames))


def _own_store() -> dist.Store | None:
    """A connection of its own to the store of this run's processes: the other one is busy while torch waits in it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, timeout=REACH, wait_for_workers=False)
    return store

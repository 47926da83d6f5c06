"""Writing checkpoints so that none is ever lost: in the foreground what is saved, in the background that it is safe."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from strategies.sharding.engine import Engine
from trainer.checkpoints.finding import Gather, listed, newest_good, remove
from trainer.checkpoints.manifest import MANIFEST, NAME, Entry, Unreadable, read_manifest, sealed, settled, sync
from trainer.checkpoints.space import free_bytes
from trainer.checkpoints.writing import Draft, drafts, shapes_of, write
from trainer.files import write_atomically
from trainer.run.metrics import readable

MARK = "rank-{}.json"
AROUND = 2**16  # bytes that the manifest and the blocks of a file system take besides, and more
POLL = 0.02  # seconds between looks at what other processes have done


class Checkpoints:
    """The checkpoints of a run, on each of its processes.

    Processes wait for each other in `newest_good` and `save`; what goes on behind training meets in files alone, and is
    in no one's way. A checkpoint that cannot be written is given up with a warning, and the one before it stays.

    Args:
        folder: the run's `checkpoints`.
        keep: checkpoints to leave, a new one included.
        rank: number of this process.
        ranks: number of processes.
        gather: gets a list of one object on every process, and returns those of all of them.
        background: whether `save` returns as soon as all is written, and leaves the rest to a thread.
        say: shows a line; on the first process.
        beside: files that are brought to the disk with every checkpoint, where they exist.

    Attributes:
        last: the checkpoint to go on from, as far as the first process knows: it was verified, or committed.
    """

    def __init__(self, folder: Path, keep: int, *, rank: int, ranks: int, gather: Gather, background: bool,
                 say: Callable[[str], None], beside: Sequence[Path] = ()) -> None:
        self.folder, self.keep, self.rank, self.ranks = folder, keep, rank, ranks
        self.last: Path | None = None
        self._gather, self._background, self._say, self._beside = gather, background, say, beside
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._attempts = 0  # the same on every process: an attempt's folder is never that of another one

    def newest_good(self) -> Path | None:
        """The checkpoint to go on from; see `finding.newest_good`. All processes take part."""
        self.last = newest_good(self.folder, rank=self.rank, ranks=self.ranks, gather=self._gather, say=self._say)
        return self.last

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """Write a checkpoint, from all processes.

        Args:
            step: optimizer steps done.
            engine: what holds the student and its optimizer.
            state: what else the first process must remember, as plain data.
        """
        self.finish()
        self._attempts += 1
        final = self.folder / NAME.format(step)
        partial = self.folder / f".{final.name}-{self._attempts}.partial"
        files = drafts(engine, self.rank, self.ranks)
        begun = self._gather([self._begun(final, partial, files)])
        if begun[0]["there"]:  # this step is saved; writing it again would only put it at risk
            return
        needed = AROUND + sum(process["bytes"] for process in begun)
        wrong = begun[0]["wrong"] or ("there is too little room" if needed > begun[0]["free"] else None)
        if wrong is None:
            wrong = next(filter(None, self._gather([self._written(partial, files, engine)])), None)
        if wrong is not None:
            self._give_up(partial, final, needed, wrong)
            return
        values = {"step": step, **state, "shapes": shapes_of(engine)}
        self._thread = Thread(target=self._behind, daemon=True, name=f"saving {final.name}", args=(
            partial, final, [draft.name for draft in files.values()], values, needed))
        self._thread.start()
        if not self._background:
            self.finish()

    def finish(self, seconds: float | None = None) -> None:
        """Wait, at most so long, until the last checkpoint is committed or given up.

        No process waits in here for what another one's training does, only for its thread.
        """
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            return
        self._thread = None
        if self._error is not None:
            raise self._error

    # ---- in the foreground

    def _begun(self, final: Path, partial: Path, files: dict[str, Draft]) -> dict[str, Any]:
        """What this process is to write and, on the first one, whether there is a place for it."""
        own = {"bytes": sum(draft.bytes for draft in files.values()), "there": False, "wrong": None, "free": 0}
        if self.rank:
            return own
        try:
            if final.exists():
                return {**own, "there": True}
            partial.mkdir(parents=True)
            return {**own, "free": free_bytes(self.folder)}
        except OSError as error:
            return {**own, "wrong": _words(error)}

    def _written(self, partial: Path, files: dict[str, Draft], engine: Engine) -> str | None:
        try:
            write(partial, files, engine, self.rank)
        except OSError as error:
            return self._blamed(_words(error))
        return None

    # ---- behind training

    def _behind(self, *arguments: Any) -> None:
        try:
            self._settle(*arguments)
        except BaseException as error:  # to be raised where somebody can see it
            self._error = error

    def _settle(self, partial: Path, final: Path, names: list[str], values: dict[str, Any], needed: int) -> None:
        """Bring this process's files to the disk; the first one then waits for the others, and commits."""
        mark: dict[str, Any] = {}
        try:
            mark["files"] = {name: settled(partial / name) for name in names}
        except OSError as error:
            mark["wrong"] = self._blamed(_words(error))
        if self.rank:
            self._tell(partial, names, mark)
            while partial.exists():  # committed, or given up
                time.sleep(POLL)
            return
        marks = [mark, *(_awaited(partial / MARK.format(rank)) for rank in range(1, self.ranks))]
        wrong = next((mark["wrong"] for mark in marks if "wrong" in mark), None)
        if wrong is None:
            try:
                self._commit(partial, final, values, {name: Entry(*entry)._asdict() for mark in marks
                                                      for name, entry in mark["files"].items()})
                return
            except (OSError, Unreadable) as error:
                wrong = _words(error)
        self._give_up(partial, final, needed, wrong)

    def _tell(self, partial: Path, names: list[str], mark: dict[str, Any]) -> None:
        """Leave a mark for the first process, whatever it takes: on a full disk there is room without our files."""
        while partial.exists():
            try:
                write_atomically(partial / MARK.format(self.rank), json.dumps(mark))
                return
            except OSError as error:
                mark = {"wrong": self._blamed(_words(error))}
                for name in names:
                    (partial / name).unlink(missing_ok=True)
                time.sleep(POLL)

    def _commit(self, partial: Path, final: Path, values: dict[str, Any], files: dict[str, Any]) -> None:
        for mark in partial.glob(MARK.format("*")):
            mark.unlink()
        write_atomically(partial / MANIFEST, sealed({**values, "files": dict(sorted(files.items()))}))
        for path in (partial, self.folder.parent, *(file for file in self._beside if file.exists())):
            sync(path)
        os.rename(partial, final)
        sync(self.folder)
        read_manifest(final)
        self.last = final
        for old in listed(self.folder)[:-self.keep]:
            try:
                remove(old)
            except OSError as error:
                self._say(f"the old checkpoint {old.name} could not be removed: {_words(error)}")

    def _give_up(self, partial: Path, final: Path, needed: int, wrong: str) -> None:
        """Take back what was written, and say so; training goes on."""
        if self.rank:
            return
        try:
            if partial.exists():
                remove(partial)
            free = f", and {readable(free_bytes(self.folder))} are free in {self.folder}"
        except OSError as error:
            free = f"; what is there of it could not be removed: {_words(error)}"
        safe = "nothing is saved yet" if self.last is None else f"the run is safe up to {self.last.name}"
        self._say(f"warning: the checkpoint {final.name} was not written: {wrong}. It takes {readable(needed)}{free}. "
                  f"Training goes on; {safe}\n  -> make room: the next checkpoint is tried again")

    def _blamed(self, wrong: str) -> str:
        return f"process {self.rank}: {wrong}" if self.ranks > 1 else wrong


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _awaited(file: Path) -> dict[str, Any]:
    while not file.exists():
        time.sleep(POLL)
    return json.loads(file.read_text())

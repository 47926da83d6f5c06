"""Writes and commits checkpoints: files are written in the foreground, then synced and committed in the background."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from strategies.sharding.engine import Engine
from trainer.checkpoints.finding import Gather, best_kept, listed, newest_good, remove
from trainer.checkpoints.manifest import MANIFEST, NAME, Entry, Unreadable, read_manifest, sealed, settled, sync
from trainer.checkpoints.space import free_bytes
from trainer.checkpoints.writing import Draft, drafts, shapes_of, write
from trainer.files import write_atomically
from trainer.run.metrics import readable

MARK = "rank-{}.json"
AROUND = 2**16  # generous bound on the bytes of the manifest and of file system overhead
POLL = 0.02  # seconds between checks of what other processes have done


class Checkpoints:
    """The checkpoints of a run, with one instance on each process.

    `newest_good` and `save` are collective calls. The background threads communicate through files only, so they do not
    interfere with training. If a checkpoint cannot be written it is abandoned with a warning, and the previous one
    stays.

    Args:
        folder: the run's `checkpoints` folder.
        keep: number of checkpoints to keep, including a new one; that of the best evaluation is kept beside them, if
            the stored state names one in `best`.
        rank: index of this process.
        ranks: number of processes.
        gather: takes a list of one object on every process, and returns the objects of all processes.
        background: whether `save` returns once all files are written, and commits them in a thread.
        say: prints a line on the first process.
        beside: other files to sync to disk with every checkpoint, if they exist.

    Attributes:
        last: the newest verified or committed checkpoint, from which a run would resume, as far as the first process
            knows.
    """

    def __init__(self, folder: Path, keep: int, *, rank: int, ranks: int, gather: Gather, background: bool,
                 say: Callable[[str], None], beside: Sequence[Path] = ()) -> None:
        self.folder, self.keep, self.rank, self.ranks = folder, keep, rank, ranks
        self.last: Path | None = None
        self._gather, self._background, self._say, self._beside = gather, background, say, beside
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._attempts = 0  # the same on every process; gives each attempt a folder of its own

    def newest_good(self) -> Path | None:
        """The checkpoint to resume from; see `finding.newest_good`. A collective call."""
        self.last = newest_good(self.folder, rank=self.rank, ranks=self.ranks, gather=self._gather, say=self._say)
        return self.last

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """Write a checkpoint. A collective call.

        Args:
            step: optimizer steps done.
            engine: holds the student and its optimizer.
            state: other state to store, as plain data; the first process writes its own.
        """
        self.finish()
        self._attempts += 1
        final = self.folder / NAME.format(step)
        partial = self.folder / f".{final.name}-{self._attempts}.partial"
        files = drafts(engine, self.rank, self.ranks)
        begun = self._gather([self._begun(final, partial, files)])
        if begun[0]["there"]:  # this step is saved already; rewriting it would only put it at risk
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
        """Wait, for at most `seconds`, until the last checkpoint is committed or abandoned.

        This waits for the background threads of other processes, but never for their training.
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
        """The bytes that this process will write; the first process also creates the folder and checks free space."""
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

    # ---- in the background

    def _behind(self, *arguments: Any) -> None:
        try:
            self._settle(*arguments)
        except BaseException as error:  # raised later, by `finish`
            self._error = error

    def _settle(self, partial: Path, final: Path, names: list[str], values: dict[str, Any], needed: int) -> None:
        """Sync this process's files to disk. The first process then waits for the others, and commits."""
        mark: dict[str, Any] = {}
        try:
            mark["files"] = {name: settled(partial / name) for name in names}
        except OSError as error:
            mark["wrong"] = self._blamed(_words(error))
        if self.rank:
            self._tell(partial, names, mark)
            while partial.exists():  # until it is committed or abandoned
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
        """Write this process's result for the first process; on a full disk, remove our own files to make room."""
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
        spared = best_kept(self.folder) if "best" in values else None
        for old in listed(self.folder)[:-self.keep]:
            try:
                if old != spared:
                    remove(old)
            except OSError as error:
                self._say(f"the old checkpoint {old.name} could not be removed: {_words(error)}")

    def _give_up(self, partial: Path, final: Path, needed: int, wrong: str) -> None:
        """Remove what was written, and print a warning; training continues."""
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

"""The folder of generated answers: parts that any number of processes write, each once, and the data set of them all.

A part is a file that is there whole or not at all. Whoever finds all parts there puts them together, so that a work
that was killed, or was shared by several processes, ends in the same data set as one that was not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.provenance import DATA_FILE, KIND, LARGEST, PROVENANCE
from trainer.errors import UserError
from trainer.files import flatten, read_object, write_atomically

IDENTITY = ("teacher", "prompts", "decoding")
OPTIONS = {"teacher": "TEACHER", "teacher.dtype": "--dtype", "prompts": "--prompts",
           "decoding.new_tokens": "--new-tokens", "decoding.temperature": "--temperature",
           "decoding.top_p": "--top-p", "decoding.beams": "--beams", "decoding.answers": "--answers",
           "decoding.seed": "--seed", "decoding.batch_size": "--batch-size", "decoding.unfinished": "--unfinished",
           "prompts.first_tokens": "--first-tokens", "prompts.system": "--system"}


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        prompt: index of the prompt, from 0.
        text: the answer, without the token that ends it.
        tokens: how many tokens it has, with the one that ends it.
        ended: whether the teacher ended it; otherwise it was cut off.
        special: whether it had other special tokens, which are not in the text.
    """

    prompt: int
    text: str
    tokens: int
    ended: bool
    special: bool

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not self.text.strip()


class AnswerFolder:
    """A folder of answers, complete or in the making."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, path / ".parts"
        self.provenance, self.data = path / PROVENANCE, path / DATA_FILE

    def check(self) -> None:
        """Raise `UserError` if something else is at the path."""
        for place in (self.path, *self.path.parents):
            if place.is_file():
                raise UserError("--to", f"{place} is a file", value=str(self.path), way_out="name a folder")
        if self.path.exists() and not self.provenance.exists() and any(
                not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise UserError("--to", "the folder exists, and holds something else", value=str(self.path),
                            way_out="name a new folder")

    def begin(self, asked: dict[str, Any]) -> bool:
        """Claim the folder for a work, and say whether it is done already.

        Args:
            asked: what the answers depend on, by the names in `IDENTITY`.

        Raises:
            UserError: the folder holds answers of another teacher, to other prompts, or decoded otherwise.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        with self._locked(self.path / ".lock"):
            found = self._found()
            changed = {} if found is None else _changes({name: found.get(name) for name in IDENTITY}, asked)
            if changed and (found["finished"] or self.done and set(changed) != {"decoding.unfinished"}):
                raise self._other(changed)
            if found is None or changed:
                self._record({"kind": KIND, **asked, "finished": None})
            return found is not None and not changed and bool(found["finished"])

    def clean(self) -> None:
        """Remove the parts of a finished work."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.parts / f"{number:06d}.jsonl"

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Whether a part is to be made by this process, which holds it as long as the context lasts."""
        if not self.parts.exists():  # another process has put them together, and removed them
            yield False
            return
        with self._locked(self.parts / f"{number:06d}.lock", wait=False) as mine:
            yield mine and not self.part(number).exists()

    @property
    def done(self) -> int:
        """How many parts are there."""
        return len(list(self.parts.glob("*.jsonl")))

    def write(self, number: int, answers: list[Answer]) -> None:
        """Write a part whole."""
        write_atomically(self.part(number), "".join(json.dumps(one.__dict__) + "\n" for one in answers))

    def answers(self, parts: int) -> list[Answer]:
        """The answers of all parts, in the order of their prompts."""
        found = [Answer(**json.loads(line)) for number in range(parts)
                 for line in self.part(number).read_text(encoding="utf-8").splitlines()]
        return sorted(found, key=lambda one: one.prompt)

    def finish(self, records: list[dict[str, Any]], card: str, more: dict[str, Any]) -> None:
        """Write the data set, its card and its provenance, which then says that it is finished.

        Args:
            records: the records to train on.
            card: the text of README.md.
            more: what the provenance says besides, `finished` included.
        """
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(self.data, text)
        write_atomically(self.path / "README.md", card)
        raw = text.encode()
        files = {DATA_FILE: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
        self._record({**self.found, **more, "files": files})

    def _record(self, values: dict[str, Any]) -> None:
        write_atomically(self.provenance, json.dumps(values, indent=2) + "\n")

    @contextmanager
    def merging(self) -> Iterator[bool]:
        """Whether this process is to put the parts together: only if no other has done so."""
        with self._locked(self.path / ".lock"):
            yield not self.found["finished"]

    @property
    def found(self) -> dict[str, Any]:
        """The provenance of the folder, once it has been claimed."""
        found = self._found()
        assert found is not None, "it is written when the folder is claimed"
        return found

    def _found(self) -> dict[str, Any] | None:
        if not self.provenance.exists():
            return None
        try:
            found = read_object(self.provenance, LARGEST)
        except ValueError as error:
            raise self._unreadable(str(error)) from error
        if found.get("kind") != KIND or "finished" not in found:
            raise self._unreadable("it is of something else")
        return found

    def _unreadable(self, why: str) -> UserError:
        return UserError("--to", f"{self.provenance} cannot be read: {why}", value=str(self.path),
                         way_out="put it back from a copy, or name a new folder")

    def _other(self, changed: dict[str, tuple[Any, Any]]) -> UserError:
        key, (then, now) = next(iter(changed.items()))
        option = OPTIONS.get(key) or OPTIONS[key.partition(".")[0]]
        what = key if option in ("TEACHER", "--prompts") else option
        return UserError("--to", f"the folder holds answers with {what} {then!r}, and now it is {now!r}",
                         value=str(self.path), way_out="name a new folder, or give the same command again")

    @contextmanager
    def _locked(self, file: Path, wait: bool = True) -> Iterator[bool]:
        """A lock that the system releases when the process ends, however it ends; false if another has it."""
        with file.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    before, after = (flatten(json.loads(json.dumps(one))) for one in (then, now))
    return {key: (before.get(key), after.get(key)) for key in sorted({*before, *after})
            if before.get(key) != after.get(key)}

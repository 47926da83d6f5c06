"""Store on disk of results found for a block: JSON files under keys of everything that the results depend on.

Files are not trusted and nothing in them is executed: orders go through the simulator again, and a file that is damaged
or from other code is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

MOST_FILES = 1024
MOST_BYTES = 2**22  # of one file
HERE = Path(__file__).parents[1]
CODE = ("solve/*.py", "price/block_options.py", "price/costs.py", "capture/joint_graph.py")
"""Files whose change invalidates what was found with them."""


class OptionStore:
    """A folder of JSON files, each a list found for a key; used only if the folder's parent exists.

    Args:
        folder: created when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: tuple[Any, ...]) -> list[Any] | None:
        """What was kept under a key, or None."""
        file = self._file(key)
        return _waiting[file] if file in _waiting else _read(file)

    def keep(self, key: tuple[Any, ...], found: list[Any]) -> None:
        """Keep a list under a key unless it is there already; if the disk is full or read-only, nothing is kept.

        What is found before the parent folder exists, as when a run plans before it reads its data, is written together
        with what is found next.
        """
        _waiting[self._file(key)] = found
        if not self.folder.parent.is_dir():
            return
        for file in [file for file in _waiting if file.parent == self.folder]:
            self._write(file, _waiting.pop(file))

    def _write(self, file: Path, found: list[Any]) -> None:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        if _read(file) == found:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            partial.unlink(missing_ok=True)  # it could be a link
            with open(partial, "x", encoding="utf-8") as handle:
                json.dump({"found": found, "sha256": _digest(json.dumps(found))}, handle)
            os.replace(partial, file)
            self._bound()
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _bound(self) -> None:
        files = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in files[:-MOST_FILES]:
            file.unlink(missing_ok=True)

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.folder / f"{_digest(repr((_version(), *key)))}.json"


_waiting: dict[Path, list[Any]] = {}


def _read(file: Path) -> list[Any] | None:
    try:
        if file.stat().st_size > MOST_BYTES:
            return None
        values = json.loads(file.read_bytes())
        found = values["found"]
        whole = isinstance(found, list) and values["sha256"] == _digest(json.dumps(found))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if whole else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _version() -> str:
    """Hash of the code that produces the results, and of the version of torch, whose operations are priced."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(file for pattern in CODE for file in HERE.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()

"""Reads, writes and verifies the manifest of a checkpoint, which lists its files with sizes and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from trainer.files import read_object

NAME = "step-{:08d}"
MANIFEST = "state.json"
LARGEST = 64 * 2**20  # most bytes of a manifest; that of a model with 100,000 tensors has 10 MB
_FILE = re.compile(r"(model|optimizer|random)(-\d+(-of-\d+)?)?\.safetensors")
_WITHOUT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class Unreadable(ValueError):
    """A checkpoint is damaged, or belongs to another model."""


class Entry(NamedTuple):
    """A file in a manifest: its size in bytes, and its SHA-256 in hexadecimal, or None if an older version wrote it."""

    bytes: int
    sha256: str | None


def sealed(values: dict[str, Any]) -> str:
    """The text of a manifest with these values and their hash."""
    return json.dumps({**values, "sha256": _digest(values)}, indent=1)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, with `files` as `Entry` by name, and check that every file has the size it lists.

    Raises:
        Unreadable: the manifest is missing, truncated or altered, or lists files that no checkpoint has; or a file is
            missing or has another size.
    """
    state = _parsed(checkpoint / MANIFEST)
    own, files = state.pop("sha256", None), state.get("files")
    if not isinstance(files, dict) or not isinstance(state.get("shapes"), dict):
        raise Unreadable(f"{MANIFEST} does not say which files and shapes it has")
    hashed = any(isinstance(entry, dict) for entry in files.values())
    if (own is not None or hashed) and own != _digest(state):
        raise Unreadable(f"{MANIFEST} is not as it was written (its SHA-256 differs)")
    step = state.get("step")
    if type(step) is not int or NAME.format(step) != checkpoint.name:
        raise Unreadable(f"{MANIFEST} is of step {step!r}")
    state["files"] = {name: _entry(name, value) for name, value in files.items()}
    for name, entry in state["files"].items():
        found = _bytes_of(checkpoint / name)
        if found != entry.bytes:
            raise Unreadable(f"{name} has {found:,} bytes of {entry.bytes:,}")
    return state


def wrong_with(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None; each of `ranks` processes hashes a share of the files."""
    try:
        files = read_manifest(checkpoint)["files"]
        for name in sorted(files)[rank::ranks]:
            if files[name].sha256 is None:
                with safe_open(checkpoint / name, framework="pt"):
                    pass
            elif digest_of(checkpoint / name) != files[name].sha256:
                return f"{name} is not as it was written (its SHA-256 differs)"
    except Unreadable as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"it cannot be read: {error}"
    return None


def digest_of(file: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def settled(file: Path) -> Entry:
    """Sync a file to disk and verify it: drop it from the page cache where possible, read it back and compare hashes.

    Raises:
        OSError: the file cannot be synced, or reads back differently.
    """
    with file.open("rb") as handle:
        written = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        handle.seek(0)
        stored = hashlib.file_digest(handle, "sha256").hexdigest()
        size = os.fstat(handle.fileno()).st_size
    if stored != written:
        raise OSError(errno.EIO, "it reads back otherwise than it was written", str(file))
    return Entry(size, stored)


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _WITHOUT_SYNC):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


# ---- helpers

def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parsed(file: Path) -> dict[str, Any]:
    _bytes_of(file)
    try:
        return read_object(file, LARGEST)
    except ValueError as error:
        raise Unreadable(f"{file.name} is not as it was written: {error}") from error


def _entry(name: str, value: Any) -> Entry:
    """Parse and validate an entry of a manifest; its name must not lead out of the folder."""
    entry = Entry(value.get("bytes"), value.get("sha256")) if isinstance(value, dict) else Entry(value, None)
    if not _FILE.fullmatch(name) or type(entry.bytes) is not int or not (
            entry.sha256 is None or isinstance(entry.sha256, str)):
        raise Unreadable(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
    return entry


def _bytes_of(file: Path) -> int:
    """Size of a regular file. Others are refused: a link could lead anywhere, and reading a pipe might never end."""
    try:
        found = file.lstat()
    except OSError as error:
        raise Unreadable(f"{file.name} is missing" if error.errno == errno.ENOENT else f"{file.name}: {error}"
                         ) from error
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"{file.name} is no regular file")
    return found.st_size

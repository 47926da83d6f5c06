"""The manifest of a teacher cache: what it was made from, and which shards are safely on disk."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strategies.distillation.teacher_cache.cache_format import CacheDamaged, CacheMismatch, Identity, largest_shard

FORMAT = 1  # version of the files; a different one is a mismatch like that of any other field
NAME = "manifest.json"
PARTIAL = ".partial"
LARGEST = 16 * 2**20  # most bytes of a manifest, enough for 20 TB of shards


@dataclass(frozen=True)
class Shard:
    """The record of a shard that was written.

    Attributes:
        rows, tokens: number of rows, and of positions with a target, in it.
        bytes: size of the file.
        sha256: checksum of the file, in hexadecimal.
    """

    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The manifest of a cache folder; row r is in shard r // rows_per_shard.

    Attributes:
        shards: the recorded shards, by number.
    """

    folder: Path
    identity: Identity
    rows_per_shard: int
    shards: dict[int, Shard]

    @classmethod
    def load(cls, folder: Path, identity: Identity) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            CacheDamaged: it is not JSON, lacks a field, or has impossible values.
            CacheMismatch: the cache was made from other inputs.
        """
        file = folder / NAME
        if file.stat().st_size > LARGEST or not file.is_file():
            raise _no_manifest(file, f"no file of at most {LARGEST:,} bytes")
        try:
            data = json.loads(file.read_bytes())
            theirs, rows_per_shard = dict(data["identity"]), int(data["rows_per_shard"])
            shards = {int(number): Shard(**shard) for number, shard in data["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _no_manifest(file, f"{type(error).__name__}: {error}") from error
        _check_same(folder, theirs, _named(identity))
        found = cls(folder, identity, rows_per_shard, shards)
        if rows_per_shard < 1:
            raise _no_manifest(file, f"rows_per_shard = {rows_per_shard}")
        for number, shard in shards.items():
            if number not in found.numbers or shard.rows != len(found.rows(number)):
                raise _no_manifest(file, f"shard {number} cannot have {shard.rows} rows")
            _check_shard(file, number, shard, identity)
        return found

    def save(self) -> None:
        """Replace the manifest file atomically, and sync it to disk."""
        data: dict[str, Any] = {"identity": _named(self.identity), "rows_per_shard": self.rows_per_shard,
                                "shards": {number: asdict(self.shards[number]) for number in sorted(self.shards)}}
        file = self.folder / NAME
        partial(file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        put_in_place(file)

    @property
    def numbers(self) -> range:
        """Numbers of all shards, written or not."""
        return range(-(-self.identity.rows // self.rows_per_shard))

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not recorded, in ascending order."""
        return [number for number in self.numbers if number not in self.shards]

    @property
    def rows_there(self) -> int:
        """Number of rows in the recorded shards."""
        return sum(shard.rows for shard in self.shards.values())

    def rows(self, number: int) -> range:
        """Rows of a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.identity.rows))

    def file(self, number: int) -> Path:
        """Path of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def fault(self, number: int) -> str | None:
        """What is wrong with the file of a recorded shard, judged by its size alone; None if nothing is."""
        file, wanted = self.file(number), self.shards[number].bytes
        if not file.exists():
            return "is missing"
        size = file.stat().st_size
        return None if size == wanted else f"has {size} bytes instead of {wanted}"


def _named(identity: Identity) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(identity)}


def _no_manifest(file: Path, why: str) -> CacheDamaged:
    return CacheDamaged(f"{file} is not the manifest of a cache ({why}); remove it and start the writing again: the "
                        "whole cache will be written again")


def _check_shard(file: Path, number: int, shard: Shard, identity: Identity) -> None:
    """Raise `CacheDamaged` if a shard's record is impossible; this also bounds the size of what is read later."""
    for name, value, least, most in (("tokens", shard.tokens, 0, shard.rows * identity.sequence_length),
                                     ("bytes", shard.bytes, 1, largest_shard(identity, shard.rows))):
        if type(value) is not int or not least <= value <= most:  # a pipe or a device has no bytes
            raise _no_manifest(file, f"shard {number} cannot have {value} {name}")
    if not isinstance(shard.sha256, str):
        raise _no_manifest(file, f"shard {number} has no checksum")


def _check_same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise `CacheMismatch`, naming every field that differs."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if names:
        differing = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
        raise CacheMismatch(f"the cache in {folder} was made from something else: {differing}. Give another folder, or "
                            "remove this one to have it written again")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal; CPUs have instructions for it."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def partial(file: Path) -> Path:
    """Where a file is written before it is renamed into place: in a subfolder, all of which may be removed at any time.

    The safetensors library writes temporary files next to its output, and leaves them behind if it is killed.
    """
    return file.parent / PARTIAL / file.name


def put_in_place(file: Path) -> None:
    """Sync the partial file to disk, rename it into place, and sync the folder."""
    _sync(partial(file))
    os.replace(partial(file), file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Write a teacher cache in order, one shard at a time, resuming where an earlier process ended, even if killed."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO

import torch

from strategies.common.weight_file import save_weights
from strategies.distillation.teacher_cache.cache_format import (
    CacheInUse,
    Identity,
    by_row,
    bytes_per_token,
    columns,
    total_bytes,
)
from strategies.distillation.teacher_cache.cache_manifest import PARTIAL, Manifest, Shard, digest, partial, put_in_place

SHARD = 2**28  # largest bytes of a shard, unless the caller sets its number of rows


class TargetWriter:
    """Writes the shards that the manifest does not record yet; a context manager that locks out other writers.

        with TargetWriter(folder, identity) as writer:
            for row in writer.rows_left():
                writer.add([row], ask_the_teacher(row))

    A shard is written to `.partial`, synced, renamed into place, and then recorded. A recorded shard is written again
    only if its file is missing or has another size. Rows of an unfinished shard are lost with the process, and must be
    added again. A lock on `.lock` allows a single writer; it is released when the process ends, and any processes
    forked while it was held.

    Args:
        folder: created if missing.
        rows_per_shard: for a new cache; an existing one keeps its own. By default, shards have up to 256 MiB. A shard
            is held in memory until it is written, and twice while its rows are concatenated.
        stated: bytes of the whole cache, for example from `total_bytes`; by default those with a target at every
            position and no token drawn twice.

    Raises:
        CacheInUse: another process is writing there.
        CacheMismatch: the folder holds a cache made from other inputs.
        CacheDamaged: its manifest cannot be read.
        ValueError: `rows_per_shard` is out of range, the folder holds other files, or the disk lacks space for what is
            still to be written.
    """

    def __init__(self, folder: Path | str, identity: Identity, *, rows_per_shard: int | None = None,
                 stated: int | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(_lock(folder).close)
            self._manifest = _begun(folder, identity, rows_per_shard)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            _check_space(self._manifest, stated)
            (folder / PARTIAL).mkdir()
            stack.callback(shutil.rmtree, folder / PARTIAL)
            self._manifest.save()
            self._missing = self._manifest.missing
            self._rows: list[dict[str, torch.Tensor]] = []
            self._open = stack.pop_all()

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; rows of an unfinished shard are dropped."""
        self._open.close()

    @property
    def next_row(self) -> int | None:
        """The row to add next; None if the cache is complete."""
        return self._manifest.rows(self._missing[0]).start + len(self._rows) if self._missing else None

    def rows_left(self) -> Iterator[int]:
        """Rows still to be added, in order, as of this call."""
        taken, missing = len(self._rows), tuple(self._missing)
        return chain.from_iterable(self._manifest.rows(number)[0 if later else taken:]
                                   for later, number in enumerate(missing))

    def add(self, rows: Sequence[int], content: Mapping[str, torch.Tensor]) -> None:
        """Add the next rows.

        Args:
            rows: their numbers, as `rows_left` yields them.
            content: in the form that `TargetCache.read` returns: `tokens` (rows,), the number of positions with a
                target in each row, and tensors concatenated over these positions of all rows, on any device: `hidden`
                (tokens, width) in the cache's dtype, or the result of `draw_samples` or `top_k`.

        Raises:
            ValueError: these are not the next rows, or the content does not match the cache's kind.
        """
        if list(rows) != (wanted := list(islice(self.rows_left(), len(rows)))):
            raise ValueError(f"rows {list(rows)} cannot be added, the next ones are {wanted}: go by `rows_left`")
        for part in by_row(self._manifest.identity, content, len(rows)):
            self._rows.append(part)
            if len(self._rows) == len(self._manifest.rows(self._missing[0])):
                self._write()

    def _write(self) -> None:
        """Write the rows in memory as a shard and record it."""
        number, manifest = self._missing[0], self._manifest
        tensors = _joined(manifest.identity, self._rows)
        file = manifest.file(number)
        save_weights(tensors, partial(file))
        size, checksum = partial(file).stat().st_size, digest(partial(file))
        put_in_place(file)
        manifest.shards[number] = Shard(len(self._rows), int(tensors["offsets"][-1]), size, checksum)
        manifest.save()
        del self._missing[0]
        self._rows = []


def _joined(identity: Identity, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a shard: those of its rows concatenated, and (rows + 1,) int64 offsets of the rows."""
    wanted = columns(identity)
    tensors = {name: torch.cat([row[name] for row in rows]) for name in wanted}
    names = {column.ragged: name for name, column in wanted.items()}
    tensors["offsets"] = _offsets([len(row[names[False]]) for row in rows])
    if True in names:
        tensors["drawn_offsets"] = _offsets([len(row[names[True]]) for row in rows])
    return tensors


def _offsets(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def _begun(folder: Path, identity: Identity, rows_per_shard: int | None) -> Manifest:
    """The folder's manifest, less the shards whose files are missing or incomplete; a new one if it has none."""
    if rows_per_shard is None:
        rows_per_shard = max(1, min(identity.rows, int(SHARD / (bytes_per_token(identity) * identity.sequence_length))))
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard = {rows_per_shard}: a shard has one row or more")
    try:
        manifest = Manifest.load(folder, identity)
    except FileNotFoundError:
        others = [path.name for path in folder.iterdir() if not path.name.startswith((".", "shard-"))]
        if others:
            raise ValueError(f"{folder} holds other things than a cache, for example {min(others)}: give a folder of "
                             "its own") from None
        manifest = Manifest(folder, identity, rows_per_shard, {})
    manifest.shards = {number: shard for number, shard in manifest.shards.items() if not manifest.fault(number)}
    return manifest


def _check_space(manifest: Manifest, stated: int | None) -> None:
    identity = manifest.identity
    if stated is None:
        stated = total_bytes(identity, identity.rows * identity.sequence_length)
    needed = stated - stated * manifest.rows_there // identity.rows
    free = shutil.disk_usage(manifest.folder).free
    if needed > free:
        raise ValueError(f"the cache in {manifest.folder} needs another {needed} bytes, and its disk has {free} free: "
                         "give a folder on another disk, or cache less (fewer rows, draws or k, or float16)")


def _lock(folder: Path) -> IO[str]:
    """Lock out other writers until the file is closed.

    Raises:
        CacheInUse: another process holds the lock.
    """
    handle = (folder / ".lock").open("a")  # append mode: if it is a link, its target keeps its content
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise CacheInUse(f"another process is writing the cache in {folder}: wait for it to end, or give another "
                         "folder") from error
    return handle

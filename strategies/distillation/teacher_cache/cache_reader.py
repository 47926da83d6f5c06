"""The cache of a teacher's targets: the teacher is asked once, what it says is kept on disk, and training reads it.

A cache is a folder with `manifest.json` and shards of a fixed number of rows each, safetensors. A row is a training
sequence; only its learned positions are kept, concatenated over the rows of a shard, with offsets. `TargetWriter` makes
it, `TargetCache` reads rows in any order, and an `Identity` says what both are about. Nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from strategies.distillation.teacher_cache.cache_format import (
    CacheDamaged,
    CacheInUse,
    CacheMismatch,
    CacheUnfinished,
    Identity,
    bytes_per_token,
    columns,
    fault_of,
    stored,
    total_bytes,
)
from strategies.distillation.teacher_cache.cache_manifest import NAME, Manifest, digest
from strategies.distillation.teacher_cache.cache_writer import TargetWriter


class TargetCache:
    """Reads a finished cache, row by row in any order, without loading any shard whole.

    Sizes of all shards are checked here; a shard's checksum when it is first used, which reads it once. `verify` does
    so for all shards, and workers that are forked, or given the cache, afterwards do not check again. Not to be held
    while something else changes the files: they are mapped into memory.

    Raises:
        CacheUnfinished: rows are missing.
        CacheMismatch: it was made from something else.
        CacheDamaged: a file is not what was written.
    """

    def __init__(self, folder: Path | str, identity: Identity) -> None:
        try:
            self._manifest = Manifest.load(Path(folder), identity)
        except FileNotFoundError as error:
            raise CacheUnfinished(f"there is no cache in {folder} (no {NAME}): 0 of {identity.rows} rows are there; "
                                  "write it first") from error
        if self._manifest.rows_there != identity.rows:
            raise CacheUnfinished(f"the cache in {folder} is not finished: {self._manifest.rows_there} of "
                                  f"{identity.rows} rows are there; start the writing again, it goes on from there")
        for number in self._manifest.numbers:
            if fault := self._manifest.fault(number):
                raise self._damaged(number, fault)
        self._checked: set[int] = set()
        self._shards: dict[int, tuple[Any, dict[bool, list[int]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a mapped file is opened again by who needs it

    @property
    def tokens(self) -> int:
        """Learned positions of all rows."""
        return sum(shard.tokens for shard in self._manifest.shards.values())

    def read(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The content of some rows, one after another as asked, new and on the CPU.

        Returns:
            `tokens` (rows,) int64, learned positions of each row; and concatenated over them, what `TargetWriter.add`
            was given: `hidden`, or `ids`, `log_p` and `log_tail`, or `distinct`, `ids`, `counts` and `log_p`. Integers
            are int64, floating tensors in the cache's dtype, `log_tail` fp32.

        Raises:
            ValueError: no rows, or one that the cache does not have.
            CacheDamaged: a shard is not what was written.
        """
        identity = self._manifest.identity
        if not rows or not all(0 <= row < identity.rows for row in rows):
            raise ValueError(f"rows = {list(rows)}: one or more from 0 to {identity.rows - 1} are expected")
        parts = [self._row(row) for row in rows]
        content = {name: column.unpacked(torch.cat([part[name] for part in parts]))
                   for name, column in columns(identity).items()}
        if fault := fault_of(identity, content):
            raise CacheDamaged(f"rows {list(rows)} in {self._manifest.folder} are not what a teacher said: {fault}; "
                               "remove the folder and start the writing again")
        return {"tokens": torch.tensor([part["tokens"] for part in parts]), **content}

    def verify(self) -> None:
        """Check all shards now.

        Raises:
            CacheDamaged: one is not what was written.
        """
        for number in self._manifest.numbers:
            self._check(number)

    def _row(self, row: int) -> dict[str, Any]:
        """The packed tensors of a row, and the number of its learned positions."""
        number, at = divmod(row, self._manifest.rows_per_shard)
        file, offsets = self._shard(number)
        part: dict[str, Any] = {"tokens": offsets[False][at + 1] - offsets[False][at]}
        for name, column in columns(self._manifest.identity).items():
            start, stop = offsets[column.ragged][at:at + 2]
            part[name] = file.get_slice(name)[start:stop]
        return part

    def _shard(self, number: int) -> tuple[Any, dict[bool, list[int]]]:
        """A shard's mapped file, and where its rows begin: in tensors by token, and in ragged ones."""
        if number not in self._shards:
            self._check(number)
            try:
                self._shards[number] = self._opened(number)
            except (SafetensorError, ValueError, TypeError, IndexError) as error:
                raise self._damaged(number, f"does not hold its rows ({error})") from error
        return self._shards[number]

    def _opened(self, number: int) -> tuple[Any, dict[bool, list[int]]]:
        """The same, for a file that may be anything.

        Raises:
            SafetensorError, ValueError, TypeError, IndexError: it is not a shard of this cache.
        """
        identity, shard = self._manifest.identity, self._manifest.shards[number]
        file = safe_open(self._manifest.file(number), "pt")
        offsets = {False: file.get_tensor("offsets").tolist()}
        if identity.kind == "samples":
            offsets[True] = file.get_tensor("drawn_offsets").tolist()
        wanted = stored(identity, shard.rows, {ragged: places[-1] for ragged, places in offsets.items()})
        for name, shape in wanted.items():
            part = file.get_slice(name)
            if (found := (part.get_dtype(), part.get_shape())) != shape:
                raise ValueError(f"{name} is {found} instead of {shape}")
        for ragged, places in offsets.items():
            longest = max(end - begin for begin, end in pairwise(places))
            if places[0] != 0 or places != sorted(places) or not ragged and (
                    places[-1] != shard.tokens or longest > identity.sequence_length):
                raise ValueError("its offsets are not those of rows")
        return file, offsets

    def _check(self, number: int) -> None:
        """Compare a shard's checksum, once."""
        if number in self._checked:
            return
        if fault := self._manifest.fault(number):
            raise self._damaged(number, fault)
        if digest(self._manifest.file(number)) != self._manifest.shards[number].sha256:
            raise self._damaged(number, "has the right size and another checksum")
        self._checked.add(number)

    def _damaged(self, number: int, fault: str) -> CacheDamaged:
        return CacheDamaged(f"{self._manifest.file(number)} {fault}; remove it and start the writing again: this shard "
                            "alone will be written again")


__all__ = ["CacheDamaged", "CacheInUse", "CacheMismatch", "CacheUnfinished", "Identity", "TargetCache", "TargetWriter",
           "bytes_per_token", "total_bytes"]

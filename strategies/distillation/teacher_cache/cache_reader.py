"""Cache of teacher targets: the teacher runs once, its targets are stored on disk, and training reads them from there.

A cache is a folder with `manifest.json` and safetensors shards of a fixed number of rows each. A row is a training
sequence; only its positions with a target are stored, concatenated over the rows of a shard, with offsets.
`TargetWriter` writes a cache, `TargetCache` reads rows in any order, and an `Identity` says what the cache was made
from. Loading a cache executes no code from it.
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
    """Reads rows of a finished cache in any order, without loading whole shards.

    Creating it checks the sizes of all shards. A shard's checksum is verified at its first use, which reads the file
    once. `verify` does that for all shards; workers that are forked afterwards, or get a pickled copy, do not check
    again. The files are memory-mapped: nothing else may change them while this exists.

    Raises:
        CacheUnfinished: rows are missing.
        CacheMismatch: the cache was made from other inputs.
        CacheDamaged: a file differs from what was written.
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
        return self.__dict__ | {"_shards": {}}  # the receiving process opens its own mappings

    @property
    def tokens(self) -> int:
        """Number of positions with a target in all rows."""
        return sum(shard.tokens for shard in self._manifest.shards.values())

    def read(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The content of some rows in the given order, as new tensors on the CPU.

        Returns:
            `tokens` (rows,) int64, the number of positions with a target in each row; and concatenated over these
            positions, what was passed to `TargetWriter.add`: `hidden`, or `ids`, `log_p` and `log_tail`, or `distinct`,
            `ids`, `counts` and `log_p`. Integers are int64, floating tensors have the cache's dtype, `log_tail` fp32.

        Raises:
            ValueError: `rows` is empty, or has one that the cache does not have.
            CacheDamaged: a shard differs from what was written.
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
        """Verify the checksums of all shards.

        Raises:
            CacheDamaged: a shard differs from what was written.
        """
        for number in self._manifest.numbers:
            self._check(number)

    def _row(self, row: int) -> dict[str, Any]:
        """The packed tensors of a row, and its number of positions with a target."""
        number, at = divmod(row, self._manifest.rows_per_shard)
        file, offsets = self._shard(number)
        part: dict[str, Any] = {"tokens": offsets[False][at + 1] - offsets[False][at]}
        for name, column in columns(self._manifest.identity).items():
            start, stop = offsets[column.ragged][at:at + 2]
            part[name] = file.get_slice(name)[start:stop]
        return part

    def _shard(self, number: int) -> tuple[Any, dict[bool, list[int]]]:
        """A shard's mapped file, and the offsets of its rows in ragged tensors (True) and in the others (False)."""
        if number not in self._shards:
            self._check(number)
            try:
                self._shards[number] = self._opened(number)
            except (SafetensorError, ValueError, TypeError, IndexError) as error:
                raise self._damaged(number, f"does not hold its rows ({error})") from error
        return self._shards[number]

    def _opened(self, number: int) -> tuple[Any, dict[bool, list[int]]]:
        """Open a shard and check its structure; the file may contain anything.

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
        """Verify a shard's checksum, once."""
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

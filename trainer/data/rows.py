"""Rows of a data set: tokenized once into flat, memory-mapped files, or built while streaming."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from strategies.common.progress import report
from trainer.data.encoding import Document
from trainer.data.packing import build_row, cuts, pack
from trainer.data.row_order import Order
from trainer.errors import UserError

Row = dict[str, torch.Tensor]
Encode = Callable[[list[dict[str, Any]]], list[Document]]
BATCH, CHARACTERS = 256, 4 * 2**20  # limits of one tokenizer call: number of records, and characters in them
FILES = {"tokens": np.int32, "loss_mask": np.bool_, "bytes": np.int32}
ON_DISK = {"loss_mask": "learnt"}  # file name from the first version, kept so that its caches stay readable


def file_of(folder: Path, name: str) -> Path:
    """Path of the file for `name`, one of `FILES`, in a folder of tokenized data."""
    return folder / f"{ON_DISK.get(name, name)}.bin"


def encode_to(folder: Path, documents: Iterable[dict[str, Any]], encoder: Encode) -> None:
    """Tokenize documents into `folder`: flat files of tokens, loss mask and bytes, and the offsets of document ends.

    The files are written to a temporary folder that is then renamed, so that an interrupted run leaves nothing that
    looks complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        ends, total = [], 0
        with ExitStack() as stack:
            handles = {name: stack.enter_context(open(file_of(partial, name), "wb")) for name in FILES}
            for document in _encoded(documents, encoder):
                for name, handle in handles.items():
                    handle.write(getattr(document, name).astype(FILES[name]).tobytes())
                total += len(document)
                ends.append(total)
                if len(ends) % BATCH == 0:
                    report("records", len(ends), None)
        np.asarray(ends, np.int64).tofile(partial / "ends.bin")
        (partial / "manifest.json").write_text(json.dumps({"documents": len(ends), "tokens": total}))
        keep_one(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def keep_one(partial: Path, folder: Path) -> None:
    """Move a complete folder to its final path, or discard it if another run has put the same content there first."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)


def _encoded(documents: Iterable[dict[str, Any]], encoder: Encode) -> Iterator[Document]:
    batch: list[dict[str, Any]] = []
    size = 0
    for record in documents:
        batch.append(record)
        size += sum(len(value) for value in record.values() if isinstance(value, (str, list)))
        if len(batch) == BATCH or size > CHARACTERS:
            yield from encoder(batch)
            batch, size = [], 0
    if batch:
        yield from encoder(batch)


class PackedRows(Dataset):
    """Map-style dataset of packed rows over the memory-mapped files of a tokenized data set.

    Args:
        folder: folder written by `encode_to`.
        capacity: tokens per row.
        packing: whether to pack several documents into a row.
        plain: whether the documents are plain text, without a prompt or messages.
        padding: id of the padding token.
        key: key of the experiment that errors refer to.

    Raises:
        UserError: the files are damaged, or no document has a target.
    """

    def __init__(self, folder: Path, capacity: int, packing: bool, plain: bool, padding: int, key: str):
        self.folder, self.capacity, self.padding = folder, capacity, padding
        self._open()
        self.rows: list[list[range]] = list(pack(self._pieces(plain), capacity, packing))
        if not self.rows:
            raise UserError(key, f"no document has a token to learn within {capacity} tokens",
                            way_out="check the fields, or raise `data.sequence_length`")

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return sum(len(piece) for row in self.rows for piece in row)

    @property
    def cut(self) -> int:
        """Number of tokens in no row: ends of long records, and documents without a target."""
        return (int(self.ends[-1]) if len(self.ends) else 0) - self.tokens

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row, without padding."""
        return np.fromiter((sum(map(len, row)) for row in self.rows), np.int64, len(self.rows))

    @property
    def learned(self) -> int:
        """Number of targets in all rows; the first token of a document is none."""
        mask = self.flat["loss_mask"]
        return sum(int(mask[piece.start + 1:piece.stop].sum()) for row in self.rows for piece in row)

    def order(self, seed: int) -> Order:
        """The order in which a run with this seed takes the rows."""
        return Order(len(self), seed)

    def token_counts(self, size: int) -> np.ndarray:
        """(size or more,) how often each token is in the data."""
        return np.bincount(self.flat["tokens"], minlength=size)

    def _pieces(self, plain: bool) -> Iterator[range]:
        """Pieces of documents, as index ranges into the flat files."""
        begin = 0
        for end in self.ends.tolist():
            for cut in cuts(self.flat["loss_mask"][begin:end], self.capacity, plain):
                yield range(begin + cut.start, begin + cut.stop)
            begin = end

    def _open(self) -> None:
        try:
            self._map()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError("run.cache", f"{self.folder} holds no tokenized data: {error}",
                            way_out="remove this folder; it will be made again") from error

    def _map(self) -> None:
        """Memory-map the files, after checking that their sizes match the manifest."""
        manifest = self.folder / "manifest.json"
        if manifest.stat().st_size > 1000:
            raise ValueError("its manifest is of another kind")
        wanted = json.loads(manifest.read_bytes())
        sizes = {"ends": 8 * wanted["documents"],
                 **{name: np.dtype(dtype).itemsize * wanted["tokens"] for name, dtype in FILES.items()}}
        for name, size in sizes.items():
            if (found := (file := file_of(self.folder, name)).stat().st_size) != size:
                raise ValueError(f"{file.name} has {found:,} bytes instead of {size:,}")
        self.ends = np.fromfile(self.folder / "ends.bin", np.int64)
        if len(self.ends) and (np.diff(self.ends, prepend=0).min() < 0 or self.ends[-1] != wanted["tokens"]):
            raise ValueError("ends.bin does not count up to the number of tokens")
        self.flat = {name: np.memmap(file_of(self.folder, name), dtype, "r") if len(self.ends) else np.zeros(0, dtype)
                     for name, dtype in FILES.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("flat", "ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()  # each data-loader worker maps the files itself

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`; -1 gives a row of padding without targets."""
        parts = [Document(**{name: flat[piece.start:piece.stop] for name, flat in self.flat.items()})
                 for piece in (self.rows[index] if index >= 0 else ())]
        return {**build_row(parts, self.capacity, self.padding), "row": torch.tensor(index)}


class StreamedRows(IterableDataset):
    """Endless dataset of rows built during training; each epoch is shuffled within a buffer, by seed and epoch.

    Every process reads the whole stream and keeps only its own micro-batches, so that row n is the same for any number
    of processes.
    """

    def __init__(self, documents: datasets.IterableDataset, encoder: Encode, capacity: int, packing: bool,
                 plain: bool, padding: int, shuffle: tuple[int, int] | None):
        self.documents, self.encoder, self.capacity = documents, encoder, capacity
        self.packing, self.plain, self.padding, self.shuffle = packing, plain, padding, shuffle
        self.micro_batch, self.replica, self.replicas, self.skip = 1, 0, 1, 0

    def share(self, micro_batch: int, replica: int, replicas: int, skip: int) -> StreamedRows:
        """A copy of the stream that yields one replica's micro-batches, after the first `skip` rows."""
        shared = copy.copy(self)
        shared.micro_batch, shared.replica, shared.replicas, shared.skip = micro_batch, replica, replicas, skip
        return shared

    def rows(self) -> Iterator[Row]:
        """All rows of the stream in order: endless with shuffling, a single epoch without."""
        documents = self.documents
        if self.shuffle:
            documents = documents.shuffle(seed=self.shuffle[0], buffer_size=self.shuffle[1])
        epoch = number = 0
        while True:
            documents.set_epoch(epoch)
            pieces = (document[cut] for document in _encoded(documents, self.encoder)
                      for cut in cuts(document.loss_mask, self.capacity, self.plain))
            before = number
            for row in pack(pieces, self.capacity, self.packing):
                yield {**build_row(row, self.capacity, self.padding), "row": torch.tensor(number)}
                number += 1
            if not self.shuffle:
                return
            if number == before:
                raise UserError("data.path", f"no document has a token to learn within {self.capacity} tokens",
                                way_out="check the fields, or raise `data.sequence_length`")
            epoch += 1

    def __iter__(self) -> Iterator[Row]:
        batch: list[Row] = []
        for number, row in enumerate(self.rows()):
            micro = number // self.micro_batch
            if number < self.skip or micro % self.replicas != self.replica:
                continue
            batch.append(row)
            if len(batch) == self.micro_batch:
                yield {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
                batch = []


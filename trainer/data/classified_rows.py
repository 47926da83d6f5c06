"""Rows of classified texts and images: prepared once into flat, memory-mapped files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data.row_order import Order
from trainer.data.rows import Row, keep_one
from trainer.errors import UserError
from trainer.experiment.task_nodes import Images


def write_arrays(folder: Path, records: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write records into `folder`: of each array in them one flat file, and the offsets of the records in it.

    The files are written to a temporary folder that is then renamed, so that an interrupted run leaves nothing that
    looks complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        handles: dict[str, Any] = {}
        ends: dict[str, list[int]] = {}
        kinds: dict[str, str] = {}
        for record in records:
            for name, array in record.items():
                if name not in handles:
                    handles[name] = open(partial / f"{name}.bin", "wb")  # noqa: SIM115 - closed below, with all others
                    ends[name], kinds[name] = [], array.dtype.str
                handles[name].write(np.ascontiguousarray(array).tobytes())
                ends[name].append((ends[name] or [0])[-1] + array.size)
        for handle in handles.values():
            handle.close()
        for name, own in ends.items():
            np.asarray(own, np.int64).tofile(partial / f"{name}.ends.bin")
        (partial / "manifest.json").write_text(json.dumps({"arrays": kinds, "records": len(next(iter(ends.values())))}))
        keep_one(partial, folder)
    except BaseException:
        for handle in handles.values():
            handle.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Arrays:
    """The arrays of records that `write_arrays` wrote, memory-mapped.

    Raises:
        UserError: the files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            self.records = int(manifest["records"])
            self.ends = {name: np.fromfile(folder / f"{name}.ends.bin", np.int64) for name in manifest["arrays"]}
            self.flat = {}
            for name, kind in manifest["arrays"].items():
                count = int(self.ends[name][-1]) if self.records else 0
                file, size = folder / f"{name}.bin", np.dtype(kind).itemsize
                if len(self.ends[name]) != self.records or file.stat().st_size != count * size:
                    raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes instead of {count * size:,}")
                self.flat[name] = np.memmap(file, kind, "r") if count else np.zeros(0, kind)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError("run.cache", f"{folder} holds no prepared data: {error}",
                            way_out="remove this folder; it will be made again") from error

    def __getitem__(self, at: tuple[str, int]) -> np.ndarray:
        name, number = at
        ends = self.ends[name]
        return self.flat[name][ends[number - 1] if number else 0:ends[number]]

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self.folder,)  # each data-loader worker maps the files itself


class _Rows(Dataset):
    """Rows of a classified data set, by number; -1 gives a row without a target."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.arrays.folder

    def __len__(self) -> int:
        return self.arrays.records

    def order(self, seed: int) -> Order:
        """The order in which a run with this seed takes the rows."""
        return Order(len(self), seed)


class TextRows(_Rows):
    """Texts with a class each, or with one for each token.

    Args:
        arrays: `tokens`, `labels` (one, or one for each token), `bytes` (1), perhaps `segments`.
        capacity: tokens of a row; the texts are cut to it already.
        padding: id of the padding token.
        per_token: whether each token has a label.
    """

    def __init__(self, arrays: Arrays, capacity: int, padding: int, per_token: bool) -> None:
        super().__init__(arrays)
        self.capacity, self.padding, self.per_token = capacity, padding, per_token

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row, without padding."""
        return np.diff(self.arrays.ends["tokens"], prepend=0)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`.

        Returns:
            input_ids, attention_mask: (capacity,) tokens, padded at the end, and 1 where there is one.
            token_type_ids: (capacity,) which of two texts a token is of, where the tokenizer says.
            targets: () class, or (capacity,) with `IGNORED` where a token has none.
            length, bytes, row: () tokens before the padding, bytes of text, number of the row.
        """
        there, number = index >= 0, max(index, 0)
        tokens = self.arrays["tokens", number]
        ids, mask = np.full(self.capacity, self.padding, np.int64), np.zeros(self.capacity, np.int64)
        ids[:len(tokens)], mask[:len(tokens)] = tokens, 1
        labels = self.arrays["labels", number].astype(np.int64)
        if self.per_token:
            labels = np.concatenate([labels, np.full(self.capacity - len(labels), IGNORED)])
        targets = torch.from_numpy(labels) if self.per_token else torch.tensor(int(labels[0]))
        row = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
               "targets": targets if there else torch.full_like(targets, IGNORED),
               "bytes": torch.tensor(int(self.arrays["bytes", number][0]) * there),
               "length": torch.tensor(len(tokens) * there), "row": torch.tensor(index)}
        if "segments" in self.arrays.flat:
            segments = np.zeros(self.capacity, np.int64)
            segments[:len(tokens)] = self.arrays["segments", number]
            row["token_type_ids"] = torch.from_numpy(segments)
        return row


class ImageOrder(Order):
    """An order that goes on behind the last row of a run with images without a label, -1 - row.

    So a last batch that is filled up has images like others, for batch norms take statistics of all that they see.
    """

    def filler(self, position: int) -> int:
        """-1 - row."""
        return -1 - Order.__getitem__(self, position)


class VariedOrder(ImageOrder):
    """An order whose entries say in which epoch a row is taken, too: row + rows * (epoch + 1)."""

    def __getitem__(self, position: int) -> int:
        return super().__getitem__(position) + self.rows * (position // self.rows + 1)


class ImageRows(_Rows):
    """Images with a class each.

    Training images are varied as the settings say, by seed, epoch and row alone, so that a resumed run sees the same.

    Args:
        arrays: `pixels`, (channels * size * size) bytes of each image, and `labels` (1).
        images: size, channels, normalization, and how training images are varied.
        seed: of the variations.
    """

    def __init__(self, arrays: Arrays, images: Images, seed: int = 0) -> None:
        super().__init__(arrays)
        self.images, self.seed = images, seed
        self.mean, self.std = (np.asarray(values * (images.channels if len(values) == 1 else 1), np.float32)[
            :, None, None] for values in (images.mean, images.std))

    def order(self, seed: int) -> Order:
        """The order in which a run with this seed takes the rows; with variations also the epoch of each."""
        return (VariedOrder if self.images.flip or self.images.shift else ImageOrder)(len(self), seed)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`: `pixel_values` (channels, size, size), `targets` (), `length` (1), `bytes` (0), `row`.

        A negative index is an image without a target, whose `length` is 0 and `row` is -1.
        """
        epoch, number = divmod(index, len(self)) if index >= 0 else (0, -1 - index)
        size, channels = self.images.size, self.images.channels
        pixels = np.asarray(self.arrays["pixels", number]).reshape(channels, size, size)
        if epoch:
            pixels = self._varied(pixels, np.random.default_rng([self.seed, epoch, number]))
        values = (pixels.astype(np.float32) / 255 - self.mean) / self.std
        label = int(self.arrays["labels", number][0]) if index >= 0 else IGNORED
        return {"pixel_values": torch.from_numpy(np.ascontiguousarray(values)), "targets": torch.tensor(label),
                "length": torch.tensor(int(index >= 0)), "bytes": torch.tensor(0),
                "row": torch.tensor(number if index >= 0 else -1)}

    def _varied(self, pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The image mirrored or not, and moved by up to `shift` pixels each way."""
        most, size = self.images.shift, self.images.size
        if self.images.flip and draw.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        if most:
            down, right = draw.integers(0, 2 * most + 1, 2)
            pixels = np.pad(pixels, ((0, 0), (most, most), (most, most)))[:, down:down + size, right:right + size]
        return pixels

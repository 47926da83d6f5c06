"""Classified records that are on this machine, for a dry run: nothing is downloaded, and nothing stays on the disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.data import sources
from trainer.data.class_names import classes_of
from trainer.data.temporary_folder import temporary_folder
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

ELSEWHERE = {"sequence_length", "tokenizer", "packing", "workers", "class_names"}  # keys that no record depends on


@dataclass(frozen=True)
class Here:
    """The records of an experiment that are on this machine.

    Attributes:
        train: training records; None if they are on the hub alone.
        held_out: held-out records; None likewise.
        copied: whether they are the copy of an earlier run.
    """

    train: sources.Documents | None
    held_out: sources.Documents | None
    copied: bool = False


def records_here(data: Data, cache: Path) -> Here:
    """The records of classified data as far as they are on this machine; read once in a process.

    Args:
        cache: the folder shared between runs, which may have data of the hub from an earlier one.

    Raises:
        UserError: they cannot be read.
    """
    return _read(data.model_dump_json(exclude=ELSEWHERE), cache, stamp_of(data))[0]


def class_names_here(data: Data, cache: Path) -> tuple[str, ...]:
    """The classes of some data, without downloading any.

    Raises:
        UserError: as in `classes_of`, or they are in data of the hub that is not on this machine.
    """
    if data.class_names is not None:
        return data.class_names
    found = records_here(data, cache).train
    if found is None:
        raise UserError("data.path", "its classes are not known: it is no local data, and a dry run downloads nothing",
                        value=data.path, way_out="list them in data.class_names, or have limbeck show-data download it")
    return classes_of(data, found)


def stamp_of(data: Data) -> tuple[Any, ...]:
    """Changes whenever local files of the data do."""
    paths = [path for path in (data.path, data.validation.path) if path]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for path in paths for file in sources.files_of(path)
                 for stat in (Path(file).stat(),))


@lru_cache(maxsize=1)
def _read(data: str, cache: Path, stamp: tuple[Any, ...]) -> tuple[Here, tempfile.TemporaryDirectory[str] | None]:
    """The records, and the folder that they are in as long as this process needs them."""
    asked = Data.model_validate_json(data)
    validation = asked.validation
    own = validation.path or validation.split
    other = asked.model_copy(update={"path": validation.path or asked.path, "max_documents": None,
                                     "split": validation.split or asked.split})
    if sources.is_local(asked.path) and (validation.path is None or sources.is_local(validation.path)):
        folder = temporary_folder()
        corpus = sources.open_corpus(asked, Path(folder.name))
        return Here(corpus.train, corpus.validation), folder
    if sources.is_local(asked.path):
        folder = temporary_folder()
        return Here(sources.open_training(asked, Path(folder.name)), sources.from_hub_cache(other, cache)), folder
    train = sources.from_hub_cache(asked, cache)
    if train is None or own:
        return Here(train, sources.from_hub_cache(other, cache) if train is not None else None, True), None
    corpus = sources.divided(train, asked)
    return Here(corpus.train, corpus.validation, True), None

"""Where documents come from: a hub id, a folder, a file or glob, or this interpreter's own library."""

from __future__ import annotations

import glob
import json
import os
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from trainer.errors import UserError
from trainer.experiment.nodes import Data

PYTHON_LIBRARY = "python-library"
BUILDERS = {".txt": "text", ".md": "text", ".rst": "text", ".py": "text", ".jsonl": "json", ".json": "json",
            ".parquet": "parquet"}
Documents = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents. A document is a record with the fields that the experiment names."""

    train: Documents
    validation: Documents


def open_corpus(data: Data, cache: Path) -> Corpus:
    """Open the documents of an experiment.

    Raises:
        UserError: nothing at the path, an empty data set, a field that no record has, or too little to hold out.
    """
    train = _open(data, data.path, data.split, "data.path", cache)
    _check_fields(train, data)
    held_out = data.validation
    if held_out.path or held_out.split:
        key = "data.validation.path" if held_out.path else "data.validation.split"
        validation = _open(data, held_out.path or data.path, held_out.split or data.split, key, cache)
        _check_fields(validation, data)
        if data.max_documents:
            train = train.take(data.max_documents)
        return Corpus(train, validation)
    if data.max_documents:
        train = train.take(data.max_documents)
    if data.streaming:  # a stream has no length to take a share of: its first documents are held out
        rest = train.skip(held_out.rows)
        if next(iter(rest), None) is None:
            raise UserError("data.validation.rows", "the stream has no more documents than are held out (a text file "
                            "is one document)", value=held_out.rows,
                            way_out="name held-out text in `data.validation.path`, or hold out fewer documents")
        return Corpus(rest, train.take(held_out.rows))
    if len(train) == 1:
        train = _cut_in_two(train, data, held_out.fraction)
        return Corpus(train.select([0]), train.select([1]))
    # A fixed seed: experiments that differ only in their seed are measured on the same text.
    parts = train.train_test_split(test_size=max(1, round(held_out.fraction * len(train))), seed=0)
    return Corpus(parts["train"], parts["test"])


def fields(data: Data) -> list[str]:
    """The fields of a record that are read."""
    if data.messages:
        return [data.messages]
    return [data.prompt, data.response] if data.prompt and data.response else [data.text]


def _open(data: Data, path: str, split: str, key: str, cache: Path) -> Documents:
    options = {"split": split, "streaming": data.streaming, "cache_dir": str(cache / "datasets")}
    try:
        if path == PYTHON_LIBRARY:
            if split != "train":
                raise UserError(key, "the python-library has no splits", value=split, way_out="remove the split")
            documents = _python_library(data.streaming)
        elif files := _local_files(path):
            documents = _load_files(files, path, key, options)  # their one split is `train`; slices of it work
        else:
            check_path(path, key)
            documents = datasets.load_dataset(path, data.name, revision=data.revision, **options)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise UserError(key, f"no such file or folder here, and no such data set on the hub: {_last_line(error)}",
                        value=path, way_out="check the spelling and, for a hub id, the network") from error
    except (DatasetGenerationError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        _explain_broken(_local_files(path), key, path)
        raise UserError(key, f"cannot read this data set: {_last_line(error)}", value=path,
                        way_out="check that every file is valid, and `data.name` and `data.split`") from error
    if not data.streaming and len(documents) == 0 or data.streaming and next(iter(documents), None) is None:
        raise UserError(key, "the data set is empty", value=path, way_out="name data with at least one record")
    return documents


def check_path(path: str, key: str) -> None:
    """Raise `UserError` for a path that can only be meant locally, and has nothing there."""
    local = path.startswith((".", "/")) or glob.has_magic(path) or Path(path).suffix in BUILDERS
    if path != PYTHON_LIBRARY and local and not _local_files(path) and not os.path.isdir(path):
        what = "no file matches this pattern" if glob.has_magic(path) else "there is no such file or folder"
        raise UserError(key, what, value=path,
                        way_out="name an existing path, a glob such as texts/*.txt, or a hub id")
    if os.path.isdir(path) and not any(file.is_file() for file in Path(path).rglob("*")):
        raise UserError(key, "this folder is empty", value=path, way_out="name a folder with text, JSONL or Parquet")


def _explain_broken(files: list[str], key: str, path: str) -> None:
    """Say where a local file is broken, which the readers do not."""
    for file in files:
        if BUILDERS.get(Path(file).suffix) == "parquet":
            continue
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    text = line.decode("utf-8")
                    if file.endswith(".jsonl") and text.strip():
                        json.loads(text)
                except UnicodeDecodeError as error:
                    raise UserError(key, f"{file}:{number} is not UTF-8 text", value=path,
                                    way_out="convert the file, for example with iconv -f LATIN1 -t UTF-8") from error
                except ValueError as error:
                    raise UserError(key, f"{file}:{number} is not JSON: {error}", value=path,
                                    way_out="mend or remove this line") from error


def _local_files(path: str) -> list[str]:
    """Files of a glob, a file, or a folder of plain text; a folder in the hub's layout is left to `datasets`."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in BUILDERS and file.is_file())
        kinds = {BUILDERS[Path(file).suffix] for file in found}
        return found if kinds == {"text"} else []
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def _load_files(files: list[str], path: str, key: str, options: dict) -> Documents:
    kinds = {BUILDERS.get(Path(file).suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise UserError(key, "these files are not all text, all JSONL or all Parquet", value=path,
                        way_out=f"known endings: {', '.join(BUILDERS)}")
    if all(os.path.getsize(file) == 0 for file in files):
        raise UserError(key, "the data set is empty", value=path, way_out="name data with at least one record")
    kind = kinds.pop()
    more = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=files, **options, **more)


def _python_library(streaming: bool) -> Documents:
    """This interpreter's own library, a file a document, without tests, installed packages and tables of characters.

    In an order that is shuffled once and always the same, so that the first documents are a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "encodings", "__pycache__"}
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")
                   if not skipped & set(file.relative_to(root).parts))
    if not files:
        raise UserError("data.path", "this interpreter has no library sources on disk", value=PYTHON_LIBRARY,
                        way_out="name a text file or folder instead")
    random.Random(0).shuffle(files)
    texts = [(root / file).read_text(encoding="utf-8", errors="replace") for file in files]
    documents = datasets.Dataset.from_dict({"text": [text for text in texts if text.strip()]})
    return documents.to_iterable_dataset() if streaming else documents


def _check_fields(documents: Documents, data: Data) -> None:
    columns = documents.column_names or list(next(iter(documents)))
    for key in ("messages", "prompt", "response", "text"):
        name = getattr(data, key)
        if name in fields(data) and name not in columns:
            raise UserError(f"data.{key}", "the records have no such field", value=name,
                            way_out=f"their fields are {', '.join(columns)}")


def _cut_in_two(documents: datasets.Dataset, data: Data, fraction: float) -> datasets.Dataset:
    """A single text becomes two at a line's end near the share that is held out."""
    text = documents[0].get(data.text)
    if fields(data) != [data.text] or not isinstance(text, str) or len(text) < 100:
        raise UserError("data.validation.fraction", "one record is too little to hold some of it out", value=fraction,
                        way_out="name held-out text in `data.validation.path`")
    cut = int(len(text) * (1 - fraction))
    cut = text.find("\n", cut) + 1 or cut
    if not text[cut:].strip():
        cut = int(len(text) * (1 - fraction))
    return datasets.Dataset.from_dict({data.text: [text[:cut], text[cut:]]})


def _last_line(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[-1][:300] if lines else type(cause).__name__

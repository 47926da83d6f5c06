"""Open the documents of an experiment: a hub id, a folder, a file or glob, or Python's own standard library.

Local text, JSON and CSV files are read by `LocalFiles`; Parquet and hub data are read by `datasets`, restricted to
formats that hold plain records: nothing is executed, unpickled or unpacked.
"""

from __future__ import annotations

import glob
import os
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.naming import camelcase_to_snakecase
from datasets.utils.extract import Extractor
from pyarrow import parquet

from trainer.data.encoding import LONGEST
from trainer.data.image_files import image_records
from trainer.data.local_files import local_builder, read_keys
from trainer.data.missing_fields import no_such_field
from trainer.errors import UserError
from trainer.experiment.data_nodes import DEFAULT_PATH, Data

PYTHON_LIBRARY = DEFAULT_PATH
NUMBER = "limbeck record number"  # added to records of token ids: the number of each in its source, from 1
UNPACKED = 200  # largest decompression ratio of a Parquet file: ten times that of text
RECORDS = ("arrow", "cache", "csv", "json", "parquet", "text")  # builders of `datasets` that may be used
BUILDERS = {".txt": "text", ".md": "text", ".rst": "text", ".py": "text", ".jsonl": "json", ".json": "json",
            ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
Documents = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; a document is a record with the fields that the experiment names."""

    train: Documents
    validation: Documents


def open_corpus(data: Data, cache: Path) -> Corpus:
    """Open the documents of an experiment.

    Raises:
        UserError: nothing at the path, an empty data set, a field that no record has, or too little data to hold out.
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
    return divided(train.take(data.max_documents) if data.max_documents else train, data)


def divided(train: Documents, data: Data) -> Corpus:
    """Hold out a part of some documents, as a run does where no held-out data is named.

    Raises:
        UserError: there are too few of them.
    """
    held_out = data.validation
    if data.streaming:  # a stream has no length to take a fraction of, so its first documents are held out
        rest = train.skip(held_out.rows)
        if next(iter(rest), None) is None:
            raise UserError("data.validation.rows", "the stream has no more documents than are held out (a text file "
                            "is one document)", value=held_out.rows,
                            way_out="name held-out text in `data.validation.path`, or hold out fewer documents")
        return Corpus(rest, train.take(held_out.rows))
    if len(train) == 1:
        train = _cut_in_two(train, data, held_out.fraction)
        return Corpus(train.select([0]), train.select([1]))
    # A fixed seed, so that experiments which differ only in their seed are evaluated on the same text.
    parts = train.train_test_split(test_size=max(1, round(held_out.fraction * len(train))), seed=0)
    return Corpus(parts["train"], parts["test"])


def open_training(data: Data, cache: Path) -> Documents:
    """Open the training documents alone, with those that will be held out; raises the errors of `open_corpus`."""
    train = _open(data, data.path, data.split, "data.path", cache)
    _check_fields(train, data)
    return train.take(data.max_documents) if data.max_documents else train


def from_hub_cache(data: Data, cache: Path) -> Documents | None:
    """The training documents of a hub data set that an earlier run has prepared in `cache`, or None.

    The newest copy is taken. Nothing is written, and the hub is not asked: it may have a newer version.
    """
    *owner, name = data.path.split("/")
    ends = re.compile(f"-{re.escape(data.split.partition('[')[0])}(-\\d+-of-\\d+)?$")
    copies = (cache / "datasets" / "___".join([*owner, camelcase_to_snakecase(name)])).glob(f"{data.name or '*'}/*/*")
    for copy in sorted(copies, key=os.path.getmtime, reverse=True):
        if files := sorted(file for file in copy.glob("*.arrow") if ends.search(file.stem)):
            documents = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
            _check_fields(documents, data)
            return documents.take(data.max_documents) if data.max_documents else documents
    return None


def is_local(path: str) -> bool:
    """Whether data is read without a network."""
    return path == PYTHON_LIBRARY or os.path.isdir(path) or bool(_local_files(path))


def files_of(path: str) -> list[str]:
    """The local files of a path; none for `python-library`."""
    if os.path.isdir(path):
        return sorted(str(file) for file in Path(path).rglob("*") if file.suffix in BUILDERS and file.is_file())
    return _local_files(path)


def fields(data: Data) -> list[str]:
    """Names of the record fields that the experiment reads."""
    return [getattr(data, key) for key in read_keys(data)]


def _open(data: Data, path: str, split: str, key: str, cache: Path) -> Documents:
    try:
        if path == PYTHON_LIBRARY:
            if split != "train":
                raise UserError(key, "the python-library has no splits", value=split, way_out="remove the split")
            documents = _python_library(data.streaming)
        elif data.task == "image_classification" and (images := image_records(data, path, key)) is not None:
            documents = images
        else:
            builder = _builder(data, path, key, str(cache / "datasets"))
            if data.streaming:
                documents = builder.as_streaming_dataset(split=split)
            else:
                builder.download_and_prepare()
                documents = builder.as_dataset(split=split)
        if data.input_ids:
            documents = _numbered(documents)
        empty = not len(documents) if not data.streaming else next(iter(documents), None) is None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise UserError(key, f"no such file or folder here, and no such data set on the hub: {_last_line(error)}",
                        value=path, way_out="check the spelling and, for a hub id, the network") from error
    except (DatasetGenerationError, ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if "corresponds to no data" in str(error):  # a table that has only its header
            raise _empty(key, path) from error
        raise UserError(key, f"cannot read this data set: {_last_line(error)}", value=path,
                        way_out="check that every file is valid, and `data.name` and `data.split`") from error
    if empty:
        raise _empty(key, path)
    return documents


def _empty(key: str, path: str) -> UserError:
    return UserError(key, "the data set is empty", value=path, way_out="name data with at least one record")


def check_path(path: str, key: str) -> None:
    """Raise `UserError` for a path that is clearly local, but where there is nothing."""
    local = path.startswith((".", "/")) or glob.has_magic(path) or Path(path).suffix in BUILDERS
    if path != PYTHON_LIBRARY and local and not _local_files(path) and not os.path.isdir(path):
        what = "no file matches this pattern" if glob.has_magic(path) else "there is no such file or folder"
        raise UserError(key, what, value=path,
                        way_out="name an existing path, a glob such as texts/*.txt, or a hub id")
    if os.path.isdir(path) and not any(file.is_file() for file in Path(path).rglob("*")):
        raise UserError(key, "this folder is empty", value=path,
                        way_out="name a folder with text, JSONL, CSV or Parquet")


def _local_files(path: str) -> list[str]:
    """Files of a glob, a single file, or a folder of plain text; none for other folders, which `datasets` reads."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in BUILDERS and file.is_file())
        kinds = {BUILDERS[Path(file).suffix] for file in found}
        return found if kinds == {"text"} else []
    found = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    return sorted(file for file in found if os.path.isfile(file))


def _builder(data: Data, path: str, key: str, cache: str) -> datasets.DatasetBuilder:
    """The dataset builder for a path; of its files, only Parquet metadata has been read by now."""
    if files := _local_files(path):
        kind = _kind(files, path, key)
        if kind != "parquet":
            return local_builder({"train": files}, kind, data, path, key, cache)  # slices such as train[:10%] work
        _check_packed(files, path, key)
        return datasets.load_dataset_builder(kind, data_files=files, cache_dir=cache)
    check_path(path, key)
    builder = datasets.load_dataset_builder(path, data.name, revision=data.revision, cache_dir=cache)
    if builder.name == "imagefolder" and data.task == "image_classification" and os.path.isdir(path):
        raise UserError(key, "the images in this folder are in no folders of their classes", value=path,
                        way_out="put those of each class into a folder of its own, or name a file of records with the "
                        "fields of data.image and data.label")
    if builder.name not in RECORDS:
        raise UserError(key, f"this data set is {builder.name}, not records of text", value=path,
                        way_out="convert it to JSONL or Parquet")
    if os.path.isdir(path):
        splits = {split: list(files) for split, files in builder.config.data_files.items()}
        files = [file for files in splits.values() for file in files]
        inside = os.path.abspath(path) + os.sep
        if outside := next((file for file in files if not os.path.abspath(file).startswith(inside)), None):
            raise UserError(key, f"the folder's README.md names a file outside of it: {outside}", value=path,
                            way_out="mend or remove its `configs`")
        if builder.name in ("json", "csv"):
            return local_builder(splits, builder.name, data, path, key, cache)
        _check_packed(files, path, key)
    return builder


def _kind(files: list[str], path: str, key: str) -> str:
    kinds = {BUILDERS.get(Path(file).suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise UserError(key, "these files are not all text, all JSONL, all CSV or all Parquet", value=path,
                        way_out=f"known endings: {', '.join(BUILDERS)}")
    if all(os.path.getsize(file) == 0 for file in files):
        raise _empty(key, path)
    return kinds.pop()


def _check_packed(files: list[str], path: str, key: str) -> None:
    """Raise `UserError` for compressed files, and for Parquet files whose claimed size is implausibly large."""
    for file in files:
        if Extractor.infer_extractor_format(file):
            raise UserError(key, f"{file} is compressed, and nothing is unpacked", value=path, way_out="unpack it")
        if Path(file).suffix != ".parquet":
            continue
        try:
            groups = parquet.read_metadata(file)
        except (ValueError, OSError) as error:
            raise UserError(key, f"{file} is not Parquet: {_last_line(error)}", value=path,
                            way_out="copy it again, or remove it") from error
        rows = [groups.row_group(number) for number in range(groups.num_row_groups)]
        claimed = max(sum(group.total_byte_size for group in rows), sum(group.num_rows for group in rows))
        if claimed > max(LONGEST, UNPACKED * os.path.getsize(file)):
            raise UserError(key, f"{file} has {os.path.getsize(file):,} bytes and claims {claimed:,} unpacked",
                            value=path, way_out="remove it")


def _python_library(streaming: bool) -> Documents:
    """The source of Python's standard library, one file per document, without tests, site-packages and `encodings`.

    The order is shuffled with a fixed seed, so that the first documents are a representative sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "encodings", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skipped  # they may hold far more files than all the rest
        files += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise UserError("data.path", "this interpreter has no library sources on disk", value=PYTHON_LIBRARY,
                        way_out="name a text file or folder instead")
    random.Random(0).shuffle(files)
    texts = [(root / file).read_text(encoding="utf-8", errors="replace") for file in files]
    documents = datasets.Dataset.from_dict({"text": [text for text in texts if text.strip()]})
    return documents.to_iterable_dataset() if streaming else documents


def _numbered(documents: Documents) -> Documents:
    """The documents with a field that has the number of each, which is lost when they are shuffled."""
    if isinstance(documents, datasets.Dataset):
        return documents.add_column(NUMBER, range(1, len(documents) + 1))
    return documents.map(lambda record, number: {**record, NUMBER: number + 1}, with_indices=True)


def _check_fields(documents: Documents, data: Data) -> None:
    first = next(iter(documents))
    columns = documents.column_names or list(first)
    for key in read_keys(data):
        if getattr(data, key) not in columns:
            raise no_such_field(key, getattr(data, key), {**dict.fromkeys(columns), **first})


def _cut_in_two(documents: datasets.Dataset, data: Data, fraction: float) -> datasets.Dataset:
    """Split a single text in two, at the end of a line near the fraction to hold out."""
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

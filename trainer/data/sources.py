"""Where documents come from: a hub id, a folder, a file or glob, or this interpreter's own library.

Text and JSON that lie here are read by `LocalFiles`: by the line, strictly, and never more than `LONGEST` bytes of a
document, whatever is in a file. Parquet and data of the hub are read by `datasets`, as far as they are records alone:
nothing is executed, unpickled or unpacked.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.extract import Extractor
from pyarrow import parquet

from trainer.data.encoding import LONGEST, field_of
from trainer.errors import UserError
from trainer.experiment.nodes import Data

PYTHON_LIBRARY = "python-library"
TABLE = 16 * 2**20  # bytes of text that are written at a time, or one longer document
UNPACKED = 200  # times its size that a Parquet file may take unpacked: ten times what text does
RECORDS = ("arrow", "cache", "csv", "json", "parquet", "text")  # what `datasets` may read, by its own names
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
    return [getattr(data, key) for key in _keys(data)]


def _keys(data: Data) -> tuple[str, ...]:
    """The keys of `data` that name the fields which are read."""
    return ("messages",) if data.messages else ("prompt", "response") if data.prompt and data.response else ("text",)


def _open(data: Data, path: str, split: str, key: str, cache: Path) -> Documents:
    try:
        if path == PYTHON_LIBRARY:
            if split != "train":
                raise UserError(key, "the python-library has no splits", value=split, way_out="remove the split")
            documents = _python_library(data.streaming)
        else:
            builder = _builder(data, path, key, str(cache / "datasets"))
            if data.streaming:
                documents = builder.as_streaming_dataset(split=split)
            else:
                builder.download_and_prepare()
                documents = builder.as_dataset(split=split)
        empty = not len(documents) if not data.streaming else next(iter(documents), None) is None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise UserError(key, f"no such file or folder here, and no such data set on the hub: {_last_line(error)}",
                        value=path, way_out="check the spelling and, for a hub id, the network") from error
    except (DatasetGenerationError, ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(key, f"cannot read this data set: {_last_line(error)}", value=path,
                        way_out="check that every file is valid, and `data.name` and `data.split`") from error
    if empty:
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


def _local_files(path: str) -> list[str]:
    """Files of a glob, a file, or a folder of plain text; a folder in the hub's layout is left to `datasets`."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in BUILDERS and file.is_file())
        kinds = {BUILDERS[Path(file).suffix] for file in found}
        return found if kinds == {"text"} else []
    found = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    return sorted(file for file in found if os.path.isfile(file))


def _builder(data: Data, path: str, key: str, cache: str) -> datasets.DatasetBuilder:
    """What reads a path, none of whose files has been read but Parquet's descriptions of themselves."""
    if files := _local_files(path):
        kind = _kind(files, path, key)
        if kind != "parquet":
            return _local({"train": files}, kind, data, path, key, cache)  # slices of this split work
        _check_packed(files, path, key)
        return datasets.load_dataset_builder(kind, data_files=files, cache_dir=cache)
    check_path(path, key)
    builder = datasets.load_dataset_builder(path, data.name, revision=data.revision, cache_dir=cache)
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
        if builder.name == "json":
            return _local(splits, "json", data, path, key, cache)
        _check_packed(files, path, key)
    return builder


def _kind(files: list[str], path: str, key: str) -> str:
    kinds = {BUILDERS.get(Path(file).suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise UserError(key, "these files are not all text, all JSONL or all Parquet", value=path,
                        way_out=f"known endings: {', '.join(BUILDERS)}")
    if all(os.path.getsize(file) == 0 for file in files):
        raise UserError(key, "the data set is empty", value=path, way_out="name data with at least one record")
    return kinds.pop()


def _check_packed(files: list[str], path: str, key: str) -> None:
    """Raise `UserError` for archives, which would be unpacked, and for Parquet that claims what it cannot hold."""
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


@dataclass
class _Files(datasets.BuilderConfig):
    """What a cache of local files is known by.

    Attributes:
        splits: files by split.
        versions: size and time of change of each.
        kind: `text` or `json`.
        read: fields of a record by the keys that name them.
    """

    splits: dict[str, list[str]] | None = None
    versions: list[tuple[int, int]] | None = None
    kind: str = ""
    read: dict[str, str] | None = None


class LocalFiles(datasets.ArrowBasedBuilder):
    """Text files as documents, and JSON records, of which the fields that are named are kept.

    Attributes:
        asked: (key, path) of the experiment that led here, for messages.
    """

    BUILDER_CONFIG_CLASS = _Files
    asked: tuple[str, str]

    def _info(self) -> datasets.DatasetInfo:
        plain, own = datasets.Value("string"), datasets.Json()
        read = self.config.read
        return datasets.DatasetInfo(features=datasets.Features(
            {name: own if key == "messages" else plain for key, name in read.items()} if self.config.kind == "json"
            else {"text": plain}))

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": files})
                for split, files in self.config.splits.items()]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pyarrow.Table]]:
        schema = self.info.features.arrow_schema
        for number, file in enumerate(files):
            rows: list[dict[str, str]] = []
            part = size = 0
            for record in self._records(file, first=number == 0):
                own = sum(map(len, record.values()))
                if rows and size + own > TABLE:
                    yield Key(number, part), pyarrow.Table.from_pylist(rows, schema)
                    rows, part, size = [], part + 1, 0
                rows.append(record)
                size += own + 64  # of an empty record
            if rows:
                yield Key(number, part), pyarrow.Table.from_pylist(rows, schema)

    def _records(self, file: str, first: bool) -> Iterator[dict[str, str]]:
        if self.config.kind == "text":
            with open(file, "rb") as handle:
                content = handle.read(LONGEST + 1)
            text = self._decoded(content, file, 1)
            yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
            return
        for place, value in self._values(file):
            yield self._read(value, place, first)
            first = False

    def _values(self, file: str) -> Iterator[tuple[str, Any]]:
        """What each line of a file is, or each part of a JSON array, with its place."""
        with open(file, "rb") as handle:
            for number in count(1):
                line = handle.readline(LONGEST + 1)
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if file.endswith(".json") and line.lstrip()[:1] == b"[":
                        whole = self._parsed(line + handle.read(max(0, LONGEST + 1 - len(line))), file, 1)
                        yield from ((f"{file}, record {index}", value) for index, value in enumerate(whole, 1))
                        return
                if line.strip():
                    yield f"{file}:{number}", self._parsed(line, file, number)

    def _read(self, value: Any, place: str, first: bool) -> dict[str, str]:
        """The fields of a record that are kept, as text."""
        if not isinstance(value, dict):
            raise self._wrong(f"{place} is not a JSON object, but {type(value).__name__}", "write a {...} on each line")
        record, read = {}, self.config.read
        for key, name in read.items():
            if first and name not in value:
                raise UserError(f"data.{key}", f"the records have no such field, {place} for one", value=name,
                                way_out=f"their fields are {', '.join(str(one)[:40] for one in list(value)[:20])}")
            kind, field = list if key == "messages" else str, value.get(name)
            if not isinstance(field, kind):
                field_of({**dict.fromkeys(read.values()), **value}, key, name, kind, f", in {place}")
            record[name] = field if kind is str else json.dumps(field, ensure_ascii=False)
            try:
                record[name].encode()
            except UnicodeEncodeError as error:
                raise self._wrong(f"{place} has half a character, {record[name][error.start]!r}, in {name}",
                                  "mend or remove this record") from error
        return record

    def _parsed(self, content: bytes, file: str, line: int) -> Any:
        text = self._decoded(content, file, line)
        try:
            return json.loads(text.rstrip(), parse_constant=_no_number, parse_int=_whole)
        except json.JSONDecodeError as error:
            line += error.lineno - 1
            what = f"{error.msg}, at its character {error.colno:,}"
        except RecursionError:
            what = "it is nested too deeply"
        except ValueError as error:
            what = str(error)
        raise self._wrong(f"{file}:{line} is not JSON: {what}", "mend or remove this line")

    def _decoded(self, content: bytes, file: str, line: int) -> str:
        if len(content) > LONGEST:
            text = self.config.kind == "text"
            raise self._wrong(f"{file if text else f'{file}:{line}'} is over {LONGEST:,} bytes long, the most that one "
                              "document may have", "split it, for example with split -C 32M --additional-suffix=.txt"
                              if text else "write smaller records, each on a line of its own")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            raise self._wrong(f"{file}:{line} is not UTF-8 text",
                              "convert the file, for example with iconv -f LATIN1 -t UTF-8") from error

    def _wrong(self, problem: str, way_out: str) -> UserError:
        return UserError(self.asked[0], problem, value=self.asked[1], way_out=way_out)


def _local(splits: dict[str, list[str]], kind: str, data: Data, path: str, key: str, cache: str) -> LocalFiles:
    stats = [os.stat(file) for files in splits.values() for file in files]
    builder = LocalFiles(cache_dir=cache, dataset_name="local", splits=splits, kind=kind,
                         versions=[(stat.st_size, stat.st_mtime_ns) for stat in stats],
                         read={name: getattr(data, name) for name in _keys(data)})
    builder.asked = key, path
    return builder


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


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

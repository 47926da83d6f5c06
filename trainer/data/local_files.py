"""Dataset builder for local text, JSON and CSV files: strict, line by line, at most `LONGEST` bytes per document."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import datasets
import pyarrow
from datasets.builder import Key

from trainer.data.encoding import LONGEST, field_of
from trainer.data.missing_fields import no_such_field
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

LISTS = ("messages", "tools")  # keys whose fields hold lists, or JSON text of a list
IDS = ("input_ids", "labels")  # keys whose fields hold lists of integers, or JSON text of one
NAMES = ("words", "label")  # keys whose fields hold names, or lists of names where the record has words
TABLE = 16 * 2**20  # characters per Arrow table, unless a single document is longer


def read_keys(data: Data) -> tuple[str, ...]:
    """The keys of `data` that name the fields to read."""
    if not data.is_language:
        return data.read
    if data.messages:
        return ("messages", "tools") if data.tools else ("messages",)
    if data.input_ids:
        return IDS if data.labels else IDS[:1]
    return ("prompt", "response") if data.prompt and data.response else ("text",)


def is_integers(value: Any) -> bool:
    """Whether a value is a list of 64-bit integers."""
    return isinstance(value, (list, tuple)) and all(type(one) is int and -2**63 <= one < 2**63 for one in value)


@dataclass
class _Files(datasets.BuilderConfig):
    """Builder configuration, which identifies a cache of local files.

    Attributes:
        splits: files by split.
        versions: size and modification time of each file.
        kind: `text`, `json` or `csv`.
        read: key of `data` -> record field that it names.
    """

    splits: dict[str, list[str]] | None = None
    versions: list[tuple[int, int]] | None = None
    kind: str = ""
    read: dict[str, str] | None = None


class LocalFiles(datasets.ArrowBasedBuilder):
    """Builder for text files, one document each, and for JSON and CSV records, reduced to the fields that are read.

    Attributes:
        asked: (key, path) in the experiment, for error messages.
    """

    BUILDER_CONFIG_CLASS = _Files
    asked: tuple[str, str]
    _fields: dict[str, None]

    def _info(self) -> datasets.DatasetInfo:
        plain, read = datasets.Value("string"), self.config.read
        kinds = {**dict.fromkeys(LISTS, datasets.Json()), **dict.fromkeys(IDS, datasets.List(datasets.Value("int64")))}
        if "words" in (read or {}):
            kinds |= dict.fromkeys(NAMES, datasets.List(plain))
        return datasets.DatasetInfo(features=datasets.Features(
            {"text": plain} if self.config.kind == "text" else
            {name: kinds.get(key, plain) for key, name in read.items()}))

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": files})
                for split, files in self.config.splits.items()]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pyarrow.Table]]:
        schema = self.info.features.arrow_schema
        self._fields = {}
        for number, file in enumerate(files):
            rows: list[dict[str, Any]] = []
            part = size = 0
            for record in self._records(file, first=number == 0):
                own = sum(map(len, record.values()))
                if rows and size + own > TABLE:
                    yield Key(number, part), pyarrow.Table.from_pylist(rows, schema)
                    rows, part, size = [], part + 1, 0
                rows.append(record)
                size += own + 64  # overhead of a record
            if rows:
                yield Key(number, part), pyarrow.Table.from_pylist(rows, schema)
        name = self.config.read.get("tools")
        if name is not None and name not in self._fields and self.asked[0] == "data.path":
            raise UserError("data.tools", "no record has such a field", value=name,
                            way_out=f"their fields are {', '.join(str(one)[:40] for one in list(self._fields)[:20])}")

    def _records(self, file: str, first: bool) -> Iterator[dict[str, Any]]:
        if self.config.kind == "text":
            with open(file, "rb") as handle:
                content = handle.read(LONGEST + 1)
            text = self._decoded(content, file, 1)
            yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
            return
        for place, value in (self._lines if self.config.kind == "csv" else self._values)(file):
            yield self._read(value, place, first)
            first = False

    def _values(self, file: str) -> Iterator[tuple[str, Any]]:
        """(place, value) of each line of a JSONL file, or of each item of a JSON array."""
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

    def _lines(self, file: str) -> Iterator[tuple[str, dict[str, str]]]:
        """(place, fields) of each line of a CSV file after the first, which names the fields."""
        csv.field_size_limit(LONGEST)
        with open(file, "rb") as handle:
            lines = (self._decoded(line, file, number) for number, line in enumerate(
                iter(lambda: handle.readline(LONGEST + 1), b""), 1))
            reader = csv.reader(lines, delimiter="\t" if file.endswith(".tsv") else ",", strict=True)
            names: list[str] | None = None
            try:
                for values in reader:
                    place = f"{file}:{reader.line_num}"
                    if names is None:
                        names = self._header(values, place)
                    elif len(values) != len(names) and values:
                        raise self._wrong(f"{place} has {len(values)} fields, and the first line names {len(names)}",
                                          "mend or remove this line; a field with commas or line breaks is quoted")
                    elif values:
                        yield place, dict(zip(names, values, strict=True))
            except csv.Error as error:
                raise self._wrong(f"{file}:{reader.line_num} is not CSV: {error}",
                                  "mend or remove this line") from error

    def _header(self, names: list[str], place: str) -> list[str]:
        names[:1] = [name.removeprefix("\ufeff") for name in names[:1]]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise self._wrong(f"{place} names the field {twice!r} twice", "the first line names the fields: write one")
        return names

    def _read(self, value: Any, place: str, first: bool) -> dict[str, Any]:
        """Reduce a record to the fields that are read: strings, lists of integers, and JSON text of other lists."""
        if not isinstance(value, dict):
            raise self._wrong(f"{place} is not a JSON object, but {type(value).__name__}", "write a {...} on each line")
        record, read = {}, self.config.read
        self._fields.update(dict.fromkeys(one for one in value if first or one == read.get("tools")))
        for key, name in read.items():
            if first and name not in value and key != "tools":  # tools may appear only in later records
                raise no_such_field(key, name, value, place)
            if key in IDS:
                record[name] = self._integers(value.get(name), key, place)
                continue
            if key in NAMES:
                record[name] = self._names(value.get(name), key, place)
                continue
            kind, field = list if key in LISTS else str, value.get(name)
            if kind is list and isinstance(field, str) or key == "tools":
                field = self._list(field)
            if not isinstance(field, kind):
                field_of({**dict.fromkeys(read.values()), **value}, key, name, kind, f", in {place}")
            record[name] = field if kind is str else json.dumps(field, ensure_ascii=False)
            try:
                record[name].encode()
            except UnicodeEncodeError as error:
                raise self._wrong(f"{place} has half a character, {record[name][error.start]!r}, in {name}",
                                  "mend or remove this record") from error
        if "words" in read:
            self._check_lengths(record, place)
        return record

    def _integers(self, field: Any, key: str, place: str) -> list[int]:
        field = self._list(field) if isinstance(field, str) else field
        if not is_integers(field):
            raise UserError(f"data.{key}", f"{place} has no list of integers in this field, but "
                            f"{json.dumps(field, ensure_ascii=False)[:100]}", value=self.config.read[key],
                            way_out="mend or remove this record")
        return field

    def _names(self, field: Any, key: str, place: str) -> str | list[str]:
        """A name, such as that of a class, or a list with one for each word; numbers become names, too.

        A word may have no label, where it is null: it is not learned.
        """
        several = "words" in self.config.read
        field = self._list(field) if several and isinstance(field, str) else field
        values = field if several and isinstance(field, list) else [None] if several else [field]
        found = [_as_name(one) for one in values]
        optional = several and key == "label" and isinstance(field, list)
        if any(name is None and not (optional and one is None) for name, one in zip(found, values, strict=True)):
            wanted = ("a list of names or whole numbers" if key == "label" else "a list of words") if several else \
                "the name or number of a class"
            said = "nothing" if field in (None, "") else json.dumps(field, ensure_ascii=False, default=str)[:100]
            raise UserError(f"data.{key}", f"{place} has {said} in this field where {wanted} is expected",
                            value=self.config.read[key], way_out="mend or remove this record")
        return found if several else found[0]

    def _check_lengths(self, record: dict[str, Any], place: str) -> None:
        """Raise `UserError` if a record has words and labels of different number."""
        words, labels = (record[self.config.read[key]] for key in NAMES)
        if len(words) != len(labels):
            raise UserError("data.label", f"{place} has {len(words)} words and {len(labels)} labels",
                            value=self.config.read["label"], way_out="mend or remove this record")

    @staticmethod
    def _list(field: Any) -> Any:
        """Convert a field to a list: parse JSON text, wrap a single object, and turn an empty value into []."""
        if isinstance(field, str) and field.strip():
            try:
                field = json.loads(field)
            except (ValueError, RecursionError):
                return field
        return [field] if isinstance(field, dict) else field or []

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


def local_builder(splits: dict[str, list[str]], kind: str, data: Data, path: str, key: str, cache: str
                  ) -> LocalFiles:
    """The builder for local files, given by split; no file is read yet.

    Args:
        kind: `text`, `json` or `csv`.
        path: path of the data as in the experiment, under `key`.
    """
    stats = [os.stat(file) for files in splits.values() for file in files]
    builder = LocalFiles(cache_dir=cache, dataset_name="local", splits=splits, kind=kind,
                         versions=[(stat.st_size, stat.st_mtime_ns) for stat in stats],
                         read={name: getattr(data, name) for name in read_keys(data)})
    builder.asked = key, path
    return builder


def _as_name(value: Any) -> str | None:
    """A name as it is, and a whole number or a truth value as the name of a class; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)

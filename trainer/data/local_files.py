"""Dataset builder for local text and JSON files: strict, line by line, at most `LONGEST` bytes per document."""

from __future__ import annotations

import codecs
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
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

LISTS = ("messages", "tools")  # keys whose fields hold lists, or JSON text of a list
TABLE = 16 * 2**20  # characters per Arrow table, unless a single document is longer


def read_keys(data: Data) -> tuple[str, ...]:
    """The keys of `data` that name the fields to read."""
    if data.messages:
        return ("messages", "tools") if data.tools else ("messages",)
    return ("prompt", "response") if data.prompt and data.response else ("text",)


@dataclass
class _Files(datasets.BuilderConfig):
    """Builder configuration, which identifies a cache of local files.

    Attributes:
        splits: files by split.
        versions: size and modification time of each file.
        kind: `text` or `json`.
        read: key of `data` -> record field that it names.
    """

    splits: dict[str, list[str]] | None = None
    versions: list[tuple[int, int]] | None = None
    kind: str = ""
    read: dict[str, str] | None = None


class LocalFiles(datasets.ArrowBasedBuilder):
    """Builder for text files, one document each, and for JSON records, reduced to the fields that are read.

    Attributes:
        asked: (key, path) in the experiment, for error messages.
    """

    BUILDER_CONFIG_CLASS = _Files
    asked: tuple[str, str]
    _fields: dict[str, None]

    def _info(self) -> datasets.DatasetInfo:
        plain, own = datasets.Value("string"), datasets.Json()
        read = self.config.read
        return datasets.DatasetInfo(features=datasets.Features(
            {name: own if key in LISTS else plain for key, name in read.items()} if self.config.kind == "json"
            else {"text": plain}))

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": files})
                for split, files in self.config.splits.items()]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pyarrow.Table]]:
        schema = self.info.features.arrow_schema
        self._fields = {}
        for number, file in enumerate(files):
            rows: list[dict[str, str]] = []
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

    def _read(self, value: Any, place: str, first: bool) -> dict[str, str]:
        """Reduce a record to the fields that are read, as strings; lists become JSON text."""
        if not isinstance(value, dict):
            raise self._wrong(f"{place} is not a JSON object, but {type(value).__name__}", "write a {...} on each line")
        record, read = {}, self.config.read
        self._fields.update(dict.fromkeys(one for one in value if first or one == read.get("tools")))
        for key, name in read.items():
            if first and name not in value and key != "tools":  # tools may appear only in later records
                raise UserError(f"data.{key}", f"the records have no such field, {place} for one", value=name,
                                way_out=f"their fields are {', '.join(str(one)[:40] for one in list(value)[:20])}")
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
        return record

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
        kind: `text` or `json`.
        path: path of the data as in the experiment, under `key`.
    """
    stats = [os.stat(file) for files in splits.values() for file in files]
    builder = LocalFiles(cache_dir=cache, dataset_name="local", splits=splits, kind=kind,
                         versions=[(stat.st_size, stat.st_mtime_ns) for stat in stats],
                         read={name: getattr(data, name) for name in read_keys(data)})
    builder.asked = key, path
    return builder


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)

"""Experiments and data of other people: nothing is executed, none takes the memory, each is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.untrusted import GIB, alone, assert_refused, commands, saved_tokenizer
from trainer.data.encoding import LONGEST
from trainer.experiment.data_nodes import Data

GOOD = "name: good\nstudent:\n  architecture: {model_type: llama}\ntraining: {steps: 10}\n"  # four lines


# ---- experiments

YAML = {
    "aliases": ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
                ":5: not valid YAML: too many values (aliases of aliases?)"),
    "long aliases": (f"a: &a '{'x' * 900_000}'\nb: [{'*a, ' * 5000}]\n", ":2: not valid YAML: too many values"),
    "a chain of aliases": ("b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}]\n" for n in range(1, 3000)),
                           "too many values"),
    "an alias of itself": ("a: &a [*a]\n", ":1: not valid YAML: an alias that contains itself"),
    "lists in lists": (GOOD + "x: " + "[" * 500_000, ":5: not valid YAML: nested too deeply, over 64 levels"),
    "mappings in mappings": ("".join(" " * n + "a:\n" for n in range(1000)), ":64: not valid YAML: nested too deeply"),
    "many values": (f"a: [{'1, ' * 200_000}]\n", ":1: not valid YAML: too many values"),
    "a call": (GOOD + "x: !!python/object/apply:os.system ['touch owned']\n",
               ":5: not valid YAML: the tag !!python/object/apply:os.system is not read"),
    "a name": (GOOD + "x: !!python/name:os.system\n", ":5: not valid YAML: the tag !!python/name:os.system is"),
    "an object": (GOOD + "x: !!python/object:os.stat_result {a: 1}\n", ":5: not valid YAML: the tag !!python/object"),
    "a key that calls": (GOOD + "? !!python/object/apply:os.system ['touch owned']\n: 1\n", ":5: not valid YAML: a k"),
    "a tag of its own": (GOOD + "x: !mine {a: 1}\n", ":5: not valid YAML: the tag !mine is not read"),
    "a merge": (GOOD + "<<: {seed: 1}\n", ":5: not valid YAML: the tag !!merge is not read"),
    "a key twice": (GOOD + "data: {path: a, path: b}\n", ":5: data.path: the key stands twice\n  -> remove one"),
    "NUL": (GOOD + "x: \0\n", r":5: not valid YAML: the character '\x00' cannot be in it"),
    "NUL in quotes": (GOOD + 'data: {path: "a\\0b"}\n', ":5: not valid YAML: a character that no text has"),
    "half a character": (GOOD + 'data: {path: "\\ud800"}\n', ":5: not valid YAML: a character that no text has"),
    "Latin-1": (b"a: 1\nb: caf\xe9\n", ":2: the file is not UTF-8 text"),
    "digits": (GOOD + "seed: " + "9" * 900_000, ":5: not valid YAML: a number of 900,000 digits"),
    "hexadecimal": (GOOD + "seed: 0x" + "f" * 900_000, ":5: not valid YAML: a number of 900,002 digits"),
    "sixties": (GOOD + "seed: " + "1:" * 400_000 + "1", ":5: not valid YAML: a number of 800,001 digits"),
    "no date": (GOOD + "seed: 2001-13-45\n", ":5: seed = '2001-13-45': must be a valid integer"),
    "no number": (GOOD + "seed: !!int ''\n", ":5: not valid YAML: '' is not of the type !!int"),
    "no truth": (GOOD + "seed: !!bool maybe\n", ":5: not valid YAML: 'maybe' is not of the type !!bool"),
    "two documents": (GOOD + "---\n" + GOOD, ":5: not valid YAML: but found another document"),
    "layers": (GOOD.replace("llama}", "llama, num_hidden_layers: 1000000000}"),
               ":3: student.architecture.num_hidden_layers = 1000000000: a model has at most 10,000 layers"),
}


def test_hostile_experiments_are_refused_with_their_line(tmp_path):
    lines, wanted = [], {}
    for number, (name, (text, part)) in enumerate(YAML.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        lines.append(["--config", file, "--dry-run"])
        wanted[name] = f"{file if part.startswith(':') else ''}{part}"
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge.yaml", "wb") as handle:
        handle.truncate(2**40)
    for name, file, part in (("pipe", tmp_path / "pipe", "not a file but a pipe or a device"),
                             ("device", "/dev/zero", "not a file but a pipe or a device"),
                             ("folder", tmp_path, "cannot read this file (Is a directory)"),
                             ("terabyte", tmp_path / "huge.yaml", "over 1,000,000 bytes, too large for an experiment")):
        lines.append(["--config", file])
        wanted[name] = part
    assert_refused(alone(commands, *lines, memory=GIB // 2, cwd=tmp_path), wanted)
    assert not (tmp_path / "owned").exists()


def test_hostile_overrides_are_refused(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(GOOD)
    wanted = {"data={path: a, path: b}": "a key stands twice", "data=" + "[" * 100_000: "nested too deeply",
              "name=!!python/name:os.system": "the tag !!python/name:os.system is not read",
              "seed=" + "9" * 10_000: "a number of 10,000 digits", "name=../up": "only letters, digits",
              "name=a/b": "only letters, digits", "name=..": "only letters, digits",
              'name="a\\n"': "only letters, digits", 'run.folder="a\\0b"': "a character that no text has"}
    assert_refused(alone(commands, *(["--config", file, override, "--dry-run"] for override in wanted)), wanted)


def test_dates_are_text(tmp_path):
    from trainer.experiment.load import read_experiment

    file = tmp_path / "e.yaml"
    file.write_text(GOOD.replace("good", "2024-01-01"))
    assert read_experiment(file).experiment.name == "2024-01-01"


# ---- data

RECORD = json.dumps({"text": "some text"}) + "\n"
JSONL = {
    "no object": ("[1, 2]\n", "{}:4 is not a JSON object, but list"),
    "text alone": ('"text"\n', "{}:4 is not a JSON object, but str"),
    "another type": ('{"text": 3}\n', 'a record has int in this field where str is expected, in {}:4: {{"text": 3}}'),
    "nothing": ('{"text": null}\n', "a record has nothing in this field where str is expected, in {}:4"),
    "lists in lists": ('{"text": "x", "x": ' + "[" * 1_000_000 + "\n", "{}:4 is not JSON: it is nested too deeply"),
    "objects in objects": ('{"a": ' * 500_000 + "\n", "{}:4 is not JSON: it is nested too deeply"),
    "digits": ('{"text": "x", "n": ' + "9" * 10_000_000 + "}\n", "{}:4 is not JSON: a number of 10,000,000 digits"),
    "NaN": ('{"text": "x", "n": NaN}\n', "{}:4 is not JSON: NaN is no number in JSON"),
    "Infinity": ('{"text": "x", "n": -Infinity}\n', "{}:4 is not JSON: -Infinity is no number in JSON"),
    "half a character": ('{"text": "\\ud800"}\n', "{}:4 has half a character, '\\ud800', in text"),
    "cut": ('{"text": "x\n', "{}:4 is not JSON: Unterminated string starting at, at its character 10"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "{}:4 is not UTF-8 text"),
    "NUL": ("\0\n", "{}:4 is not JSON: Expecting value, at its character 1"),
}


def opened(*changes: dict[str, Any]) -> list[str]:
    """What is said of each data set: its mistake, or its first record."""
    from datasets import disable_progress_bars

    from trainer.data.sources import open_corpus
    from trainer.errors import UserError

    disable_progress_bars()
    said = []
    for change in changes:
        try:
            corpus = open_corpus(Data(**change), Path("cache"))
            said.append(f"{next(iter(corpus.train))}"[:200])
        except UserError as error:
            said.append(f"{error.key}: {error.problem} -> {error.way_out}")
    return said


def assert_said(answers: list[str], wanted: dict[str, str]) -> None:
    """Each holds the text which is wanted."""
    for answer, (name, part) in zip(answers, wanted.items(), strict=True):
        assert part in answer and len(answer) < 2000, f"{name}: {answer}"


@pytest.mark.parametrize("streaming", [False, True])
def test_hostile_records_are_refused_with_their_line(tmp_path, streaming):
    changes, wanted = [], {}
    for number, (name, (line, part)) in enumerate(JSONL.items()):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(RECORD.encode() * 3 + (line if isinstance(line, bytes) else line.encode()))
        changes.append({"path": str(file), "streaming": streaming, "validation": {"rows": 3}})
        wanted[name] = part.format(file)
    assert_said(alone(opened, *changes, cwd=tmp_path), wanted)


def test_documents_without_an_end_are_refused_before_they_are_read(tmp_path):
    wanted = {}
    for name in ("huge.jsonl", "huge.txt", "huge.json"):
        (tmp_path / name).write_text("[" if name == "huge.json" else "")
        os.truncate(tmp_path / name, 2**40)
        wanted[name] = f"{LONGEST:,} bytes long, the most that one document may have"
    os.mkfifo(tmp_path / "pipe.txt")
    wanted |= {"pipe.txt": "there is no such file", "pipe*": "no file matches", "/dev/zero": "there is no such file"}
    changes = [{"path": name if name.startswith("/") else str(tmp_path / name)} for name in wanted]
    answers = alone(opened, *changes, cwd=tmp_path, memory=GIB // 2)
    assert_said(answers, wanted)
    assert f"{tmp_path / 'huge.jsonl'}:1" in answers[0] and "split -C 32M" in answers[1]


def test_keys_that_are_not_asked_for_cost_nothing(tmp_path):
    """As columns they would be a table of 300,000 columns, most of it nothing."""
    lines = [json.dumps({"text": "x", **{f"k{line}_{number}": 1 for number in range(300)}}) for line in range(1000)]
    (tmp_path / "keys.jsonl").write_text("\n".join(lines))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "x", **{f"k{number}": 1 for number in range(300_000)}})
                                        + "\n" + RECORD)
    changes = [{"path": str(tmp_path / name)} for name in ("keys.jsonl", "one.jsonl")]
    assert_said(alone(opened, *changes, cwd=tmp_path, memory=GIB // 2), {"keys": "{'text': '", "one": "{'text': '"})


def test_records_are_as_they_were_written(tmp_path):
    """Without what a column has to make up: messages of one record have keys that those of another have not."""
    records = [{"m": [{"role": "user", "content": "ä\u2028"}, {"role": "assistant", "content": "b", "n": [1, None]}]},
               {"m": [{"role": "user", "content": "c", "calls": {"x": {"y": 1.5}}}]}] * 2
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, records)).encode())
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    from trainer.data.sources import open_corpus

    for name in ("lines.jsonl", "array.json"):
        corpus = open_corpus(Data(path=str(tmp_path / name), messages="m", split="train[:3]",
                                  validation={"split": "train[3:]"}), tmp_path / "cache")
        assert [*corpus.train, *corpus.validation] == records
        assert corpus.train._fingerprint == open_corpus(Data(path=str(tmp_path / name), messages="m", split="train[:3]",
                                                             validation={"split": "train[3:]"}),
                                                        tmp_path / "cache").train._fingerprint


def test_folders_that_lead_elsewhere_or_unpack_are_refused(tmp_path):
    import gzip
    import tarfile

    import pyarrow
    from pyarrow import parquet

    (tmp_path / "secret.jsonl").write_text(RECORD * 5)
    for name in ("outside", "above", "archive", "packed", "web", "script", "claims"):
        (tmp_path / name).mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    for name in ("outside", "above"):
        (tmp_path / name / "train.jsonl").write_text(RECORD * 5)
    (tmp_path / "outside" / "README.md").write_text(card.format(tmp_path / "secret.jsonl"))
    (tmp_path / "above" / "README.md").write_text(card.format("../secret.jsonl"))
    with gzip.open(tmp_path / "archive" / "train.jsonl.gz", "wb") as handle:
        handle.write(b" " * 10_000_000)
    with gzip.open(tmp_path / "packed" / "train.parquet", "wb") as handle:
        handle.write(b" " * 10_000_000)
    with tarfile.open(tmp_path / "web" / "train.tar", "w") as handle:
        handle.add(tmp_path / "secret.jsonl", "1.txt")
    (tmp_path / "script" / "script.py").write_text("open('owned', 'w')\n")
    (tmp_path / "script" / "train.jsonl").write_text(RECORD * 5)
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(80_000_000, pyarrow.int8())}),
                        tmp_path / "claims" / "train.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1" + b"\xff" * 1000 + b"PAR1")
    wanted = {"outside": "README.md names a file outside of it", "above": "README.md names a file outside of it",
              "archive": "is not UTF-8 text", "packed": "is compressed, and nothing is unpacked",
              "web": "this data set is webdataset, not records of text", "script": "cannot read this data set",
              "claims": "and claims 80,000,000 unpacked", "junk.parquet": "is not Parquet"}
    assert_said(alone(opened, *({"path": str(tmp_path / name)} for name in wanted), cwd=tmp_path), wanted)
    assert not (tmp_path / "owned").exists()


def test_templates_that_fail_are_named(tmp_path):
    from trainer.data.encoding import Encoder
    from trainer.data.tokenizers import load_tokenizer
    from trainer.errors import UserError

    folder = saved_tokenizer(tmp_path / "tokenizer")
    for template in ("{{ 1 / 0 }}", "{% for n in range(10**9) %}x{% endfor %}", "{{ messages.none.x }}",
                     "{{ 'x' + 1 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        tokenizer = load_tokenizer("data.tokenizer.path", str(folder), None)
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="the chat template refuses a record"):
            Encoder(tokenizer, Data(messages="m"))([{"m": [{"role": "user", "content": "x"}]}])

"""Files of other people: nothing in one is executed, none takes the memory, each leads to one message that names it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.distillation.cache import CacheDamaged, Identity, TargetCache, TargetWriter
from strategies.export.transformers_folder import write_folder
from tests.conftest import FORKED, TINY, sentences, train_py
from trainer import checkpoints
from trainer.checkpoints.manifest import sealed
from trainer.data.encoding import LONGEST
from trainer.data.tokenizers import train_tokenizer
from trainer.experiment.nodes import Data, Tokenizer

GIB = 2**30
GOOD = "name: good\nstudent:\n  architecture: {model_type: llama}\ntraining: {steps: 10}\n"  # four lines


def alone(function: Callable[..., Any], *arguments: Any, memory: int = GIB, cwd: Path | None = None) -> Any:
    """What a function returns in a process of its own, whose address space may not grow by more than `memory` bytes."""
    given, taken = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_alone, args=(taken, function, arguments, memory, cwd))
    process.start()
    taken.close()
    try:
        assert given.poll(120), "it does not come back"
        return given.recv()
    finally:
        process.kill()
        process.join()


def _alone(taken: Any, function: Callable[..., Any], arguments: tuple[Any, ...], memory: int, cwd: Path | None) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, resource.RLIM_INFINITY))
    if cwd:
        os.chdir(cwd)
    taken.send(function(*arguments))


def commands(*lines: list[str]) -> list[tuple[int, str]]:
    """Exit code and standard error of `train.py` for each list of arguments."""
    from trainer.cli import train

    found = []
    for line in lines:
        errors = io.StringIO()
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            code = train([str(part) for part in line])
        found.append((code, errors.getvalue()))
    return found


def assert_refused(answers: list[tuple[int, str]], wanted: dict[str, str]) -> None:
    """Each is one message that holds the text which is wanted, and the exit code of a person's mistake."""
    for (code, said), (name, part) in zip(answers, wanted.items(), strict=True):
        assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said, f"{name}: {code} {said}"
        assert part in said, f"{name}: {said}"
        assert len(said) < 2000, f"{name}: the message itself is as large as the file"


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
    from trainer.experiment.reading import read_experiment

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


# ---- models and tokenizers

def saved_tokenizer(folder: Path) -> Path:
    """A trained tokenizer."""
    train_tokenizer([{"text": sentences(1, 50)}] * 5, Data(tokenizer=Tokenizer(train_vocabulary=300)), folder)
    return folder


def header(described: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header, which claims to be of `length` bytes."""
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int = 0, end: int = 8, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SAFETENSORS = {
    "nothing": b"", "cut in its length": b"\x08\x00", "terabytes of header": header({}, length=2**42),
    "a header beyond the file": header({"w": tensor()}, bytes(8), length=5000),
    "no JSON": header(b"hello"), "lists in lists": header(b"[" * 500_000), "a list": header([1, 2]),
    "offsets beyond the file": header({"w": tensor(0, 2**40, (2**38,))}, bytes(8)),
    "overlapping": header({"a": tensor(), "b": tensor(4, 12)}, bytes(12)),
    "a hole": header({"a": tensor(), "b": tensor(16, 24)}, bytes(24)),
    "backwards": header({"w": tensor(8, 0)}, bytes(8)),
    "a product that overflows": header({"w": tensor(0, 8, (2**32, 2**32, 2**32))}, bytes(8)),
    "an unknown type": header({"w": tensor(dtype="PICKLE")}, bytes(8)),
    "negative": header({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
    "cut": header({"w": tensor(0, 4000, (1000,))}, bytes(100)), "pickled": pickle.dumps({"w": 1}) * 100,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A whole model with its tokenizer, as a hub folder is."""
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=300)).save_pretrained(folder)
    return saved_tokenizer(folder)


def copied(model: Path, folder: Path, **files: bytes | str | None) -> Path:
    """The model with other content in some of its files, whose names have `__` for a dot."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).hardlink_to(file)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_hostile_weights_are_named(model, write_experiment, tmp_path):
    file = write_experiment(student={"architecture": None}, data={"tokenizer": {"train_vocabulary": None}})
    lines, wanted = [], {}
    for number, (name, content) in enumerate(SAFETENSORS.items()):
        folder = copied(model, tmp_path / f"{number}", model__safetensors=content)
        lines.append(["--config", file, f"student.path={folder}", "--dry-run"])
        wanted[name] = f"cannot load this model: {folder / 'model.safetensors'} is not a whole safetensors file"
    answers = alone(commands, *lines, memory=GIB // 2)
    assert_refused(answers, wanted)
    assert "student.path = " in answers[0][1] and "git lfs pull" in answers[0][1]


def test_hostile_model_folders_are_named(model, write_experiment, tmp_path):
    config = json.loads((model / "config.json").read_text())

    def naming(file: Path | str) -> dict[str, str]:
        return {"model__safetensors__index__json": json.dumps({"metadata": {}, "weight_map": {"w": str(file)}})}

    whole = model / "model.safetensors"
    cases = {
        "above": (naming("../model/model.safetensors"), "names '../model/model.safetensors', which is not a"),
        "absolute": (naming(whole), f"names '{whole}', which is not a safetensors file beside it"),
        "pickled shards": (naming("w.bin"), "names 'w.bin', which is not a safetensors file beside it"),
        "missing": (naming("no.safetensors"), "names 'no.safetensors', which is not there"),
        "no map": ({"model__safetensors__index__json": "{}"}, "has no `weight_map` of file names"),
        "no index": ({"model__safetensors__index__json": "[" * 200_000}, "index.json is not JSON"),
        "adapter": ({"adapter_config__json": json.dumps({"base_model_name_or_path": "some/other"})}, "is an adapter"),
        "list": ({"config__json": "[1]"}, "config.json holds no JSON object"),
        "deep": ({"config__json": "[" * 200_000}, "config.json is not JSON"),
        "layers": ({"config__json": json.dumps({**config, "num_hidden_layers": 10**9})},
                   "more than 10,000 layers by its num_hidden_layers"),
        "types": ({"config__json": json.dumps({**config, "hidden_size": "wide"})}, "cannot load this model"),
        "kernel": ({"config__json": json.dumps({**config, "attn_implementation": "somebody/kernel"})},
                   "its attention computed by code from a hub, somebody/kernel"),
        "code": ({"config__json": json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
                  "own__py": "open('owned', 'w')\n"}, "set `trust_remote_code: true` if you have read it"),
    }
    file = write_experiment(student={"architecture": None}, data={"tokenizer": {"train_vocabulary": None}})
    lines = [["--config", file, f"student.path={copied(model, tmp_path / name, **files)}", "--dry-run"]
             for name, (files, _) in cases.items()]
    wanted = {name: part for name, (_, part) in cases.items()}
    pipe = copied(model, tmp_path / "pipe", config__json=None)
    os.mkfifo(pipe / "config.json")
    huge = copied(model, tmp_path / "huge", tokenizer__json=b"{")
    os.truncate(huge / "tokenizer.json", 2**40)
    lines += [["--config", file, f"student.path={folder}", "--dry-run"] for folder in (pipe, huge)]
    wanted |= {"pipe": "config.json is not a file",
               "huge": "tokenizer.json has 1,099,511,627,776 bytes, over 134,217,728"}
    assert_refused(alone(commands, *lines, memory=GIB // 2, cwd=tmp_path), wanted)
    assert not (tmp_path / "owned").exists()


def tokenizers_said(*folders: str) -> list[str]:
    """What is said of each tokenizer, by a process that somebody would answer yes."""
    from trainer.data.tokenizers import load_tokenizer, own_tokenizer
    from trainer.errors import UserError

    said = []
    for folder in folders:
        read, write = os.pipe()
        os.write(write, b"y\ny\ny\n")
        os.dup2(read, 0)
        for load in (partial(load_tokenizer, "data.tokenizer.path"), own_tokenizer):
            try:
                said.append(f"{load(folder, None)}"[:200])
            except UserError as error:
                said.append(f"{error.key}: {error.problem}")
    return said


def test_tokenizers_run_nothing_and_are_named(model, tmp_path):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    code = {**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    cases = {"code": ({"tokenizer_config__json": json.dumps(code), "own__py": "open('owned', 'w')\n"},
                      "cannot load this tokenizer: The repository"),
             "garbage": ({"tokenizer__json": '{"model": 3}'}, "cannot load this tokenizer"),
             "deep": ({"tokenizer__json": "[" * 200_000}, "cannot load this tokenizer"),
             "types": ({"tokenizer_config__json": "[1]"}, "cannot load this tokenizer")}
    folders = [str(copied(model, tmp_path / name, **files)) for name, (files, _) in cases.items()]
    answers = alone(tokenizers_said, *folders, cwd=tmp_path)
    assert not (tmp_path / "owned").exists()
    for (name, (_, part)), *said in zip(cases.items(), answers[::2], answers[1::2], strict=True):
        assert part in said[0], f"{name}: {said}"
        assert part in said[1], f"{name}: {said}"


# ---- caches

SAMPLES = Identity("samples", rows=4, sequence_length=5, teacher="t", tokenizer="k", data="d", vocabulary=70_000,
                   draws=3, temperature=1.0)


@pytest.fixture
def target_cache(tmp_path) -> Path:
    """A finished cache of two shards."""
    ones = torch.ones(5, dtype=torch.long)
    content = {"tokens": torch.tensor([5]), "distinct": ones, "ids": ones, "log_p": -torch.ones(5), "counts": 3 * ones}
    with TargetWriter(tmp_path / "targets", SAMPLES, rows_per_shard=2) as writer:
        for row in range(4):
            writer.add([row], content)
    return tmp_path / "targets"


def forge(cache: Path, content: bytes | None = None, **changes: Any) -> None:
    """Put other content into the second shard, or other values into its record, as who knows the format can."""
    shard, manifest = cache / "shard-00001.safetensors", cache / "manifest.json"
    data = json.loads(manifest.read_text())
    if content is not None:
        shard.write_bytes(content)
        changes |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    data["shards"]["1"] |= changes
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_shards_of_targets_are_named(target_cache, name):
    assert len(TargetCache(target_cache, SAMPLES).read([2])["ids"]) == 5
    forge(target_cache, SAFETENSORS[name])
    with pytest.raises(CacheDamaged, match="shard-00001.safetensors does not hold its rows|shard 1 cannot have"):
        TargetCache(target_cache, SAMPLES).read([2])


@pytest.mark.parametrize(("changes", "what"), [
    ({"offsets": torch.tensor([0, 5, 9])}, "distinct is"), ({"offsets": torch.tensor([0, 12, 10])}, "offsets"),
    ({"offsets": torch.tensor([-5, 5, 10])}, "offsets"), ({"offsets": torch.tensor([0, 10])}, "offsets is"),
    ({"offsets": torch.tensor(3)}, "does not hold"), ({"offsets": torch.tensor([0.0, 5.0, 10.0])}, "offsets is"),
    ({"drawn_offsets": torch.tensor([0, 2**60, 10])}, "offsets"), ({"ids": None}, "does not contain tensor ids"),
    ({"ids": torch.zeros(10, 4, dtype=torch.uint8)}, "ids is"),
    ({"log_p": torch.zeros(10, dtype=torch.int64)}, "log_p is"),
    ({"ids": torch.full((10, 3), 255, dtype=torch.uint8)}, "ids has values over 69999"),
    ({"distinct": torch.full((10, 1), 2, dtype=torch.uint8)}, "distinct does not count"),
])
def test_targets_that_would_lead_out_of_their_tensors_are_found(target_cache, changes, what):
    tensors = load_file(target_cache / "shard-00001.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, target_cache / "forged")
    content = (target_cache / "forged").read_bytes()
    (target_cache / "forged").unlink()
    forge(target_cache, content)
    with pytest.raises(CacheDamaged, match=what):
        TargetCache(target_cache, SAMPLES).read([2, 3])


@pytest.mark.parametrize(("changes", "what"), [
    ({"bytes": 2**50}, "shard 1 cannot have 1125899906842624 bytes"), ({"bytes": 0}, "cannot have 0 bytes"),
    ({"bytes": "8"}, "cannot have 8 bytes"), ({"tokens": 11}, "cannot have 11 tokens"),
    ({"tokens": None}, "cannot have None tokens"),
    ({"sha256": 5}, "has no checksum"), ({"name": "../../x"}, "unexpected keyword argument 'name'"),
])
def test_absurd_records_of_shards_are_refused(target_cache, changes, what):
    forge(target_cache, **changes)
    with pytest.raises(CacheDamaged, match=f"manifest.json is not the manifest of a cache .*{what}"):
        TargetCache(target_cache, SAMPLES)


def test_hostile_manifests_of_targets_are_refused(target_cache):
    manifest = target_cache / "manifest.json"
    whole = manifest.read_text()
    for text in (whole.replace('"rows_per_shard": 2', '"rows_per_shard": Infinity'), "[" * 1_000_000,
                 whole.replace('"tokens": 10', '"tokens": ' + "9" * 5000)):
        manifest.write_text(text)
        with pytest.raises(CacheDamaged, match="is not the manifest of a cache"):
            TargetCache(target_cache, SAMPLES)
    os.truncate(manifest, 2**40)
    with pytest.raises(CacheDamaged, match="no file of at most 16,777,216 bytes"):
        TargetCache(target_cache, SAMPLES)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(CacheDamaged, match="no file of at most 16,777,216 bytes"):
        TargetCache(target_cache, SAMPLES)


def test_a_folder_of_something_else_is_no_place_for_a_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "notes").write_text("more")
    with pytest.raises(ValueError, match="holds other things than a cache, for example thesis.tex"):
        TargetWriter(tmp_path, SAMPLES)
    assert (tmp_path / ".partial" / "notes").read_text() == "more"


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "tokens.bin").write_bytes(b"\0" * 40),
    lambda folder: (folder / "ends.bin").write_bytes(struct.pack("<q", 2**60) * (
        (folder / "ends.bin").stat().st_size // 8)),
    lambda folder: (folder / "learnt.bin").unlink(),
    lambda folder: (folder / "manifest.json").write_text("[" * 900),
    lambda folder: (folder / "manifest.json").write_text('{"documents": "x", "tokens": []}'),
])
def test_damaged_tokens_are_named(tmp_path, damage):
    import numpy as np

    from trainer.data.rows import FILES, PackedRows
    from trainer.errors import UserError

    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, dtype in FILES.items():
        np.ones(20, dtype).tofile(folder / f"{name}.bin")
    np.array([10, 20]).tofile(folder / "ends.bin")
    (folder / "manifest.json").write_text('{"documents": 2, "tokens": 20}')
    shape = {"capacity": 8, "packing": True, "plain": True, "padding": 0, "key": "data"}
    assert PackedRows(folder, **shape).tokens
    damage(folder)
    with pytest.raises(UserError, match=f"{folder} holds no tokenised data") as caught:
        PackedRows(folder, **shape)
    assert caught.value.key == "run.cache" and "it will be made again" in caught.value.way_out


# ---- a run's own files

@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a linear layer."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, folder / "model.safetensors")
    seal(folder)
    return folder


def seal(folder: Path, **changes: Any) -> None:
    """Write a manifest over what is in a checkpoint, as somebody would who knows the format."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in folder.glob("*.safetensors")}
    values = {"step": 1, "shapes": {"weight": [3, 2], "bias": [3]}, "files": files}
    (folder / "state.json").write_text(sealed({**values, **changes}))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_checkpoints_are_unreadable(checkpoint, name):
    checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))
    (checkpoint / "model.safetensors").write_bytes(SAFETENSORS[name])
    seal(checkpoint)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


@pytest.mark.parametrize("changes", [
    {"files": {"../../secret.safetensors": {"bytes": 3, "sha256": "0"}}}, {"files": {"/etc/passwd": 3}},
    {"files": {"model.safetensors": {"bytes": 2**60, "sha256": "0"}}}, {"files": {"optimizer.bin": 3}}, {"files": 3},
    {"files": {"model.safetensors": [1]}}, {"shapes": {"weight": [2**62, 2**62]}}, {"shapes": {"weight": "x"}},
    {"shapes": [1]}, {"step": "1"}, {"step": 10**30},
])
def test_hostile_manifests_of_checkpoints_are_unreadable(checkpoint, changes):
    (checkpoint.parent.parent / "secret.safetensors").write_text("abc")
    seal(checkpoint, **changes)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


@pytest.mark.parametrize("text", [b"", b"[" * 500_000, b"[1]", b"\xff", b'{"step": ' + b"9" * 5000 + b"}"])
def test_manifests_that_are_none_are_unreadable(checkpoint, text):
    (checkpoint / "state.json").write_bytes(text)
    with pytest.raises(checkpoints.Unreadable):
        checkpoints.load_whole(checkpoint, torch.nn.Linear(2, 3))


class Bomb:
    """Whoever unpickles it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.marker, "w")


def bombs(folder: Path, marker: Path, *names: str) -> None:
    """Put pickles where somebody might look for what they are named after."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith(".npy"):
            import numpy as np

            np.save(folder / name, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
        elif name.endswith(".pt"):
            torch.save({"weight": Bomb(marker)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Bomb(marker)))


def test_nothing_is_unpickled_wherever_it_lies(model, write_experiment, tmp_path):
    """A run that is gone on with, from and among folders that are full of pickles."""
    marker, data, cache = tmp_path / "owned", tmp_path / "data", tmp_path / "cache"
    bombs(tmp_path / "proof", marker, "bomb.pkl")
    pickle.loads((tmp_path / "proof" / "bomb.pkl").read_bytes()).close()
    marker.unlink()  # it works
    student = copied(model, tmp_path / "student")
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": sentences(n, 8)}) + "\n" for n in range(40)))
    arguments = ["--config", str(write_experiment(
        student={"architecture": None, "path": str(student)}, report={"control": False},
        data={"path": str(data), "tokenizer": {"train_vocabulary": None}}, run={"cache": str(cache)},
        teacher={"path": str(student), "targets": {"source": "samples"}}, training={"checkpoint_every": 2}))]
    weights = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "tokenizer.pkl", "vocab.pkl")
    bombs(student, marker, *weights, "consolidated.00.pth", "tf_model.h5", "generation_config.bin")
    bombs(data, marker, "data.pkl", "state.pt", "train.npy", "dataset_dict.pickle", "train.bin")
    done = train_py(*arguments, "training.steps=2", "schedule.warmup=0")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "tiny"
    for file in (run / "report.md", run / "student" / "receipt.json"):
        file.unlink()  # it is not finished any more
    for folder in (next((run / "checkpoints").glob("step-*")), run / "checkpoints", run, run / "student"):
        bombs(folder, marker, *weights, "optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl",
              "sampler.bin", "custom_checkpoint_0.pkl", "rng_state.pth", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        bombs(folder, marker, "state.pkl", "cache.pkl", "dataset.pt", "tokens.npy", "shard-00001.bin")
    done = train_py(*arguments, "training.steps=2", "schedule.warmup=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "report.md").exists() and not marker.exists()


def test_pickles_alone_are_refused(model, write_experiment, tmp_path):
    marker = tmp_path / "owned"
    bombs(tmp_path / "data", marker, "data.pkl", "train.npy", "state.pt")
    student = copied(model, tmp_path / "student", model__safetensors=None)
    bombs(student, marker, "pytorch_model.bin")
    teacher = copied(model, tmp_path / "teacher", model__safetensors=None, model__safetensors__index__json=json.dumps(
        {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    bombs(teacher, marker, "pytorch_model.bin")
    file = write_experiment(student={"architecture": None, "path": str(student)},
                            data={"tokenizer": {"train_vocabulary": None}})
    wanted = {f"data.path={tmp_path / 'data'}": "data.path", f"data.path={tmp_path / 'data' / 'data.pkl'}": "data.path",
              f"student.path={student}": "the folder has pickled weights only",
              f"student.path={teacher}": "names 'pytorch_model.bin', which is not a safetensors file"}
    for override, part in wanted.items():
        done = train_py("--config", str(file), override)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not marker.exists() and not (tmp_path / "tiny").exists()


# ---- links that lead out of a folder of ours

def test_links_are_removed_and_not_what_they_lead_to(model, tmp_path):
    from transformers import AutoTokenizer

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for name in ("student", ".student.partial"):
        (tmp_path / name).symlink_to(mine)
    own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    write_folder(tmp_path / "student", *own)
    assert not (tmp_path / "student").is_symlink() and (tmp_path / "student" / "model.safetensors").exists()
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / ".lock").symlink_to(mine / "thesis.tex")
    (tmp_path / "targets" / ".partial").symlink_to(mine)
    with pytest.raises(OSError), TargetWriter(tmp_path / "targets", SAMPLES):
        pass
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step-00000001-1.partial").symlink_to(mine)
    (folder / "step-00000002").symlink_to(mine)
    with pytest.raises(Exception, match="step-00000002"):
        checkpoints.newest_good(folder)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert (mine / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, cache) -> Path:
    """The folder of a finished run whose prompt is hostile to Markdown."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    values = {"name": "read-back", "student": {"architecture": TINY}, "optimizer": {"lr": 3e-3},
              "data": {"path": str(corpus), "sequence_length": 32, "tokenizer": {"train_vocabulary": 300},
                       "validation": {"fraction": 0.1, "rows": 6}},
              "training": {"steps": 2, "batch_size": 8, "micro_batch": 8},
              "report": {"sample_tokens": 4, "prompt": "The ``` <script>alert(1)</script> `\n\n# head\n```\n[a](b)"},
              "run": {"folder": str(folder / "run"), "cache": str(cache), "threads": 1}}
    (folder / "e.yaml").write_text(yaml.safe_dump(values))
    done = train_py("--config", str(folder / "e.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_prompts_and_samples_stay_text_in_the_report(finished, tmp_path):
    from trainer.report import write_report

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    found = json.loads((run / "comparison.json").read_text())
    found["student"]["sample"] = "x\n````\n<img src=x onerror=alert(1)>\n```\n# heading"
    (run / "comparison.json").write_text(json.dumps(found))
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "text": ["a <b>note</b> [x](javascript:y)\n# two"]}))
    for text in ((finished / "report.md").read_text(), write_report(run).read_text()):
        outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
        outside = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
        assert "<script" not in outside and "<img" not in outside and "<b>" not in outside.replace("\\<b\\>", "")
        assert "javascript" not in outside or "\\[x\\](javascript" in outside
        assert [line for line in outside.splitlines() if line.startswith("# ")] == ["# read-back"]


READ_BACK = [
    ("experiment.yaml", b"", "the file is empty"), ("experiment.yaml", b"a: [\n", ":2: not valid YAML"),
    ("experiment.yaml", b"name: x\n", "'teacher' is missing"), ("experiment.yaml", b"\xff", "not UTF-8 text"),
    *((name, content, f"{name} is not as a run writes it")
      for name in ("comparison.json", "plan.json", "student/receipt.json")
      for content in (b"", b"{", b"[1]", b"[" * 300_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}")),
    ("comparison.json", b"{}", "'student' is missing"), ("comparison.json", b'{"student": 3}', "is not as a run"),
    ("student/receipt.json", b"{}", "'bytes_on_disk' is missing"), ("plan.json", b"{}", "'ledger' is missing"),
    ("metrics.jsonl", b'{"step": 1}\n[\n{"step": 2}\n', "metrics.jsonl is not as a run writes it: line 2"),
    ("metrics.jsonl", b'5\n{"step": 2}\n', "metrics.jsonl is not as a run writes it: line 1"),
    ("metrics.jsonl", b"[" * 300_000 + b"\n\n", "metrics.jsonl is not as a run writes it: line 1"),
    ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n', "is not as a run writes it"),
]


def reported(*runs: str) -> list[tuple[int, str]]:
    """Exit code and standard error of `limbeck report` for each run folder."""
    from trainer.cli import limbeck

    found = []
    for run in runs:
        errors = io.StringIO()
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            code = limbeck(["report", run])
        found.append((code, errors.getvalue()))
    return found


def test_files_of_a_run_that_were_edited_are_named(finished, tmp_path):
    runs, wanted = [], {}
    for number, (name, content, part) in enumerate(READ_BACK):
        run = tmp_path / f"{number}"
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints", "*.png", "model.safetensors"))
        (run / name).write_bytes(content)
        runs.append(str(run))
        wanted[f"{number} {name}"] = part
    assert_refused(alone(reported, *runs), wanted)


def test_a_run_is_gone_on_with_or_named_when_its_files_were_edited(finished, tmp_path):
    run = tmp_path / "run"
    for name, content, code, part in (
            ("experiment.yaml", b"name: [", 2, f"{run / 'experiment.yaml'}:1: not valid YAML"),
            ("metrics.jsonl", b'x\n{"step": 1}\n', 2, "metrics.jsonl is not as a run writes it: line 1"),
            ("plan.json", b"[", 0, "")):  # it is made anew
        shutil.copytree(finished, run)
        (run / "report.md").unlink()
        (run / name).write_bytes(content)
        done = train_py("--config", str(finished.parent / "e.yaml"), f"run.folder={run}")
        assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr
        shutil.rmtree(run)


def test_what_a_link_leads_to_keeps_its_content(tmp_path):
    from trainer.folder import RunFolder, write_atomically

    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    for name in (".lock", ".plan.json.partial"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.tex")
    RunFolder(tmp_path / "run").lock(wait=False)
    write_atomically(tmp_path / "run" / "plan.json", "{}")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "run" / "plan.json").read_text() == "{}"

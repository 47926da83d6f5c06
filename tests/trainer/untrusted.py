"""Hostile files for tests, and a process with little memory to open them in."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import FORKED, TINY, sentences
from trainer.data.tokenizers import train_tokenizer
from trainer.experiment.data_nodes import Data, Tokenizer

GIB = 2**30


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


def saved_tokenizer(folder: Path) -> Path:
    """A trained tokenizer."""
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)), [{"text": sentences(1, 50)}] * 5)], folder)
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


def whole_model(folder: Path) -> Path:
    """A whole model with its tokenizer, as a hub folder is."""
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

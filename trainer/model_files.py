"""Checks of untrusted model files, made before a library reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import UserError
from trainer.files import read_object

LARGEST_JSON = 128 * 2**20  # bytes of a file other than weights; tokenizers with a million tokens take half of this
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MOST_LAYERS = 10_000  # ten times as many as the deepest models have


def check_files(path: str, key: str) -> None:
    """Check the files of a model or tokenizer before transformers reads them; a hub id has no local files to check.

    Raises:
        UserError: an entry is not a regular file or is too large, weights are incomplete or outside of the folder, or
            the folder holds an adapter.
    """
    folder = Path(path)
    try:
        _check_texts(folder)
        index = folder / "model.safetensors.index.json"
        names = indexed(index) if index.exists() else ["model.safetensors"]
        for file in (folder / name for name in names):
            if file.exists():
                _check_weights(file)
    except ValueError as error:
        raise UserError(key, f"cannot load this model: {error}", value=path, way_out="name a folder with config.json "
                        "and whole safetensors files (with git, `git lfs pull` fetches them)") from error


def _check_texts(folder: Path) -> None:
    """Raise `ValueError` for files that would block on reading, exhaust memory, or load or build far too much."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix not in (".json", ".jinja", ".model", ".txt", ".safetensors") or file.is_dir():
            continue
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        if file.suffix != ".safetensors" and file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, over {LARGEST_JSON:,}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter, which loads another model; merge the two, and save the whole")
    if (folder / "config.json").exists() and (deep := too_deep(_object(folder / "config.json"))):
        raise ValueError(f"{folder / 'config.json'} has more than {MOST_LAYERS:,} layers by its {deep}")


def too_deep(values: dict[str, Any]) -> str | None:
    """The config key that asks for more than `MOST_LAYERS` layers, which would take too long to build, or None."""
    return next((name for name, value in values.items() if re.search("layer", name) and isinstance(value, (int, float))
                 and value > MOST_LAYERS), None)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, LARGEST_JSON)
    except ValueError as error:
        raise ValueError(f"{file} is {error}") from error


def indexed(index: Path) -> list[str]:
    """Names of the safetensors files that a weights index lists, each checked to be next to it.

    Raises:
        ValueError: the index has no `weight_map`, or names a file that is missing or elsewhere.
    """
    names = _object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no `weight_map` of file names")
    for name in sorted(set(names.values())):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is not a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not there")
    return sorted(set(names.values()))


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):  # maps the file, and checks every offset and shape in its header
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def stored_dtypes(path: str) -> set[torch.dtype | None]:
    """Dtypes of the weights in a folder; None stands for other dtypes, and for a folder without safetensors files."""
    found: set[torch.dtype | None] = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= {STORED.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    return found or {None}


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def last_line(error: Exception) -> str:
    """The last line of an error's message, where multi-line errors state the reason; at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]

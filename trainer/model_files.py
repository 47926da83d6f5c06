"""Files of a model that somebody else wrote, looked at before a library reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import UserError
from trainer.files import read_object

LARGEST_JSON = 128 * 2**20  # bytes of a file beside weights; the tokenizers of a million tokens take half of it
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MOST_LAYERS = 10_000  # ten times what the deepest models have


def check_files(path: str, key: str) -> None:
    """Look at the files of a model or tokenizer before transformers reads them; a hub id has none here yet.

    Raises:
        UserError: one is no file or too large, weights are not whole or elsewhere, or the folder is an adapter.
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
    """Raise `ValueError` for a text that would be waited for, fill the memory, or lead to more than it says."""
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
    """The key that gives a model more layers than there is time to make."""
    return next((name for name, value in values.items() if re.search("layer", name) and isinstance(value, (int, float))
                 and value > MOST_LAYERS), None)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, LARGEST_JSON)
    except ValueError as error:
        raise ValueError(f"{file} is {error}") from error


def indexed(index: Path) -> list[str]:
    """The files that an index of weights names, all of them beside it."""
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
        with safe_open(file, framework="pt"):  # maps the file and checks its header, every offset and shape of it
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def stored_dtypes(path: str) -> set[torch.dtype | None]:
    """Number formats of the weights in a folder, None among them for one that is not known, or not there."""
    found: set[torch.dtype | None] = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= {STORED.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    return found or {None}


def first_line(error: Exception) -> str:
    """What an error says, as far as one line of a message has room for it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def last_line(error: Exception) -> str:
    """What an error ends with: of those of several lines the reason."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]

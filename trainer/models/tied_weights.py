"""Tied weights, usually head and embeddings, that a configuration declares but the weight files may keep separate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from trainer.experiment.model_nodes import Model
from trainer.model_files import indexed

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS = 4096  # rows of two matrices that are read at a time to compare them


def settle_tying(config: PretrainedConfig, model: Model) -> None:
    """Untie a configuration that declares tied weights if the files hold two different matrices for them.

    When transformers 5 loads such files it keeps the matrices separate, but leaves the configuration tied. Everything
    that is later built from the configuration, such as a plan or the exported student, would have only one of them.
    """
    if not any(True for _ in _tying(config)) or (held := _held(model)) is None:
        return
    size = getattr(config.get_text_config(), "vocab_size", None)
    shapes = [shape for _, shape in held.values() if size is None or size in shape]
    if len(set(shapes)) == len(shapes):  # no two tensors of one shape, the common case
        return
    try:
        with torch.device("meta"):
            shaped = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        keys = {name: key for key, name in _renamed(shaped, held)}
    except Exception:  # an unusable architecture or code is reported where the model is built
        return
    for one, other in shaped.get_expanded_tied_weights_keys(all_submodels=True).items():
        if one in keys and other in keys and not _same(model, *((held[keys[name]][0], keys[name])
                                                               for name in (one, other))):
            return untie(config)


def untie(config: PretrainedConfig) -> None:
    """Set `tie_word_embeddings` to False in a configuration and those nested in it."""
    for one in list(_tying(config)):
        one.tie_word_embeddings = False


def kept_apart(model: nn.Module) -> str | None:
    """A weight that the configuration declares tied but the model holds separately, by name; None if there is none."""
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(other):
            return name
    return None


def _tying(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those nested in it, of which each that ties head and embeddings."""
    if getattr(config, "tie_word_embeddings", False):
        yield config
    for name in getattr(config, "sub_configs", None) or ():
        if isinstance(inside := getattr(config, name, None), PretrainedConfig):
            yield from _tying(inside)


def _held(model: Model) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """File and shape of each tensor in a model's files; None if they cannot be read."""
    held = {}
    try:
        index = _file(model, INDEX)
        names = [WEIGHTS] if index is None else indexed(index)
        for name in names:
            if (file := _file(model, name)) is None:
                return _on_hub(model)
            with safe_open(file, framework="pt") as handle:
                held |= {key: (name, tuple(handle.get_slice(key).get_shape())) for key in handle.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError):  # reported where the files are loaded
        return None
    return held


def _on_hub(model: Model) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """`_held` for a hub repository; fetches only the headers of its files."""
    assert model.path is not None
    if Path(model.path).is_dir():
        return None
    try:
        found = get_safetensors_metadata(model.path, revision=model.revision or "main").files_metadata
    except Exception:  # no network or no such repository: reported where it is loaded
        return None
    return {key: (name, tuple(one.shape)) for name, file in found.items() for key, one in file.tensors.items()}


def _file(model: Model, name: str, fetched: bool = False) -> Path | None:
    """A file of a folder, or of a hub repository; None if there is none.

    Args:
        fetched: whether to download a hub file; if not, only the local cache is searched.
    """
    assert model.path is not None
    if Path(model.path).is_dir():
        file = Path(model.path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision or "main", local_files_only=not fetched))
    except (OSError, ValueError):  # the errors of huggingface_hub derive from these
        return None


def _renamed(model: nn.Module, held: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each tensor's name in the files and its name in the model, by transformers' own renaming."""
    known, prefix, state = get_model_conversion_mapping(model), model.base_model_prefix, model.state_dict()
    renamings = [one for one in known if isinstance(one, WeightRenaming)]
    converters = [one for one in known if isinstance(one, WeightConverter)]
    for key in sorted(held, key=dot_natural_key):
        name, _ = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, _ = rename_source_key(key, [], [], prefix, state)
        yield key, name


def _same(model: Model, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two tensors, each given by file and key, are equal; they are compared `ROWS` rows at a time."""
    files = [_file(model, name, fetched=True) for name, _ in (one, other)]
    if None in files:
        return True  # the files cannot be fetched, which is reported where they are loaded
    with safe_open(files[0], framework="pt") as first, safe_open(files[1], framework="pt") as second:
        ours, theirs = first.get_slice(one[1]), second.get_slice(other[1])
        if ours.get_shape() != theirs.get_shape():
            return False
        rows = ours.get_shape()[0]
        return all(torch.equal(ours[begin:begin + ROWS].float(), theirs[begin:begin + ROWS].float())
                   for begin in range(0, rows, ROWS))

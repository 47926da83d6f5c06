"""Validates the keys of an `architecture`: whether its transformers configuration knows them and they took effect.

A configuration class accepts any key, so a misspelled one would be stored and ignored. A key counts as known if the
class declares it (fields, signature, `attribute_map`), documents it, or reads it, either in its own code or in the code
of its models, for example by `getattr(config, "head_dim", None)`. Keys of earlier transformers versions, which
published files still have, are known too if the class maps them (`rope_theta` and `rope_scaling` to `rope_parameters`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig, PretrainedConfig

from trainer.errors import UserError

# Keys of a published config.json that describe the file or its use, not the shape of the model.
OF_A_FILE = {"architectures", "transformers_version", "_name_or_path", "name_or_path", "auto_map", "torch_dtype",
             "dtype", "torchscript", "task_specific_params", "_attn_implementation_autoset", "quantization_config"}
PASTED = {"architectures", "transformers_version", "_name_or_path", "auto_map", "torch_dtype"}
ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
_READ = re.compile(r"""\bconfig\.(\w+)|\bgetattr\(\s*(?:self\.)?config,\s*["'](\w+)""")
_POPPED = re.compile(r"""kwargs(?:\.\w+\(|\[)\s*["'](\w+)|\bself\.(\w+)""")


def model_values(values: dict[str, Any], config_class: type[PretrainedConfig], key: str) -> dict[str, Any]:
    """A copy of the values of an `architecture` that shape the model, without the keys in `OF_A_FILE`.

    Args:
        values: the `architecture` without `model_type`.
        config_class: the configuration class of the model type.
        key: where the architecture is in the YAML.

    Raises:
        UserError: the class neither declares, documents nor reads a key. If a whole published config.json was pasted,
            which may have such keys, they are logged instead, unless one closely resembles a key of the class.
    """
    _check(values, config_class, key, any(name in values for name in PASTED))
    if values.get("quantization_config"):
        _note(f"{key}.quantization_config is left out: a model that is made anew is not quantized; see "
              "`student.quantization`")
    return copy.deepcopy({name: value for name, value in values.items() if name not in OF_A_FILE})


def check_arrived(config: PretrainedConfig, values: dict[str, Any], key: str) -> None:
    """Raise `UserError` if the given `rope_theta` is not the rotary base that the model will use."""
    given, parameters = values.get("rope_theta"), getattr(config, "rope_parameters", None) or {}
    if given is None or not parameters:
        return
    nested = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    used = [one["rope_theta"] for one in nested if "rope_theta" in one]
    if used and given not in used:
        raise UserError(f"{key}.rope_theta", f"`rope_parameters` or `rope_scaling` say {used[0]:g}, and are what the "
                        "model reads", value=given, way_out="give the base in one place")


def set_token(config: PretrainedConfig, name: str, token: int | list[int] | None, otherwise: int) -> None:
    """Set a special token; if the class rejects the value, as ModernBERT's rejects None, set `otherwise` instead."""
    try:
        setattr(config, name, token)
    except StrictDataclassFieldValidationError:
        setattr(config, name, otherwise)


def without_foreign_ids(config: PretrainedConfig) -> PretrainedConfig:
    """Remove special token ids outside the vocabulary: they become None, or 0 where the class requires an id.

    Returns the same configuration. An architecture's default ids belong to the model it was published with; for a new
    model the tokenizer decides. Some files have -1 for no padding token, which would exclude the last row of the
    embeddings from training.
    """
    for part in {id(one): one for one in (config, config.get_text_config(decoder=True))}.values():
        size = getattr(part, "vocab_size", None)
        for name in SPECIAL if isinstance(size, int) else ():
            value = getattr(part, name, None)
            if isinstance(value, int) and not 0 <= value < size:
                set_token(part, name, None, 0)
            elif isinstance(value, list) and not all(0 <= one < size for one in value):
                set_token(part, name, [one for one in value if 0 <= one < size] or None, 0)
    return config


@cache
def known_keys(config_class: type[PretrainedConfig]) -> frozenset[str]:
    """The keys that a configuration class declares, documents, reads or maps; see the module docstring."""
    classes = [one for one in config_class.__mro__ if issubclass(one, PretrainedConfig)]
    known = {field.name for field in dataclasses.fields(config_class)}
    for one in classes:
        known |= {*one.attribute_map, *one.attribute_map.values(), *one.__dict__.get("__annotations__", {})}
        known |= {*inspect.signature(one.__init__).parameters}
        known |= set(re.findall(r"^\s*`?(\w+)`? ?\(`", one.__doc__ or "", re.MULTILINE))
    own = "".join(_source(one) for one in classes[:classes.index(PretrainedConfig)])
    models = "" if "text_config" in config_class.sub_configs else "".join(  # else `config` is mostly that of a section
        file.read_text() for file in Path(inspect.getfile(config_class)).parent.glob("modeling_*.py"))
    known |= {name for pair in _POPPED.findall(own) + _READ.findall(models) for name in pair if name}
    if "rope_parameters" in known:
        known |= set(ROTARY)
    return frozenset(known - {"self", "args", "kwargs"})


def _check(values: dict[str, Any], config_class: type[PretrainedConfig], key: str, pasted: bool) -> None:
    """Check the keys of a configuration and, recursively, of its sections, which have classes of their own."""
    known, unread = known_keys(config_class), []
    for name, value in values.items():
        section = config_class.sub_configs.get(name)
        if isinstance(value, dict) and inspect.isclass(section) and section is not PretrainedConfig \
                and issubclass(section, PretrainedConfig):
            inner = {one: own for one, own in value.items() if one != "model_type"}
            _check(inner, section, f"{key}.{name}", pasted or any(one in inner for one in PASTED))
        if name in known or name in OF_A_FILE or (pasted and name in _generation()):
            continue
        near = difflib.get_close_matches(name, known - set(values) if pasted else known, 1, 0.85 if pasted else 0.6)
        if near or not pasted:
            raise UserError(f"{key}.{name}", f"the {config_class.model_type} architecture has no such dimension",
                            value=value, way_out=f"did you mean `{near[0]}`?" if near else
                            "remove it: the model does not read it")
        unread.append(name)
    if unread:
        _note(f"{key}: transformers' {config_class.model_type} does not read {', '.join(unread)}")


@cache
def _note(text: str) -> None:
    """Log a warning once, however often the configuration is built."""
    logging.getLogger(__name__).warning(text)


@cache
def _generation() -> frozenset[str]:
    """Generation settings, which older config.json files contain."""
    return frozenset(GenerationConfig().to_dict())


def _source(config_class: type) -> str:
    try:
        return inspect.getsource(config_class)
    except (OSError, TypeError):
        return ""

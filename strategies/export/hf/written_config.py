"""Write config.json so that transformers 4 and 5 both read it right, along with a model's custom code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

# Model types for which transformers 4 has its own names for the rotary base: of all layers, and of sliding-window ones.
BASES = {"gemma3_text": ("rope_theta", "rope_local_base_freq"), "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
         "modernbert": ("global_rope_theta", "local_rope_theta"),
         "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
         "gpt_neox": ("rotary_emb_base", None), "gpt_neox_japanese": ("rotary_emb_base", None)}
FACTORS = ("short_factor", "long_factor")
SHARES = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}


def config_of(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a model's configuration that describes the model as it is exported.

    If head and embeddings are separate tensors, `tie_word_embeddings` is set to False, whatever it was before.
    """
    config = type(model.config)(**model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], dtype
    if getattr(config, "tie_word_embeddings", False) and _two(model):
        config.tie_word_embeddings = False
    if isinstance(known := getattr(config, "auto_map", None), dict):  # its code is copied next to it
        config.auto_map = {name: value.rpartition("--")[2] if isinstance(value, str) else value
                           for name, value in known.items()}
    return config


def write_config(config: Any, folder: Path, model: nn.Module) -> None:
    """Write config.json, and next to it the custom code of a model that has some."""
    if getattr(model, "_auto_class", None) is not None:  # a class from custom code, which is exported too
        custom_object_save(model, folder, config=config)
        if type(model.config).__module__.startswith("transformers_modules"):
            custom_object_save(model.config, folder)
    config.save_pretrained(folder)
    file = folder / "config.json"
    written = with_old_keys(config, json.loads(file.read_text()), model)
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def with_old_keys(config: Any, written: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The JSON of a configuration, with the keys that transformers 4 reads in addition to those of transformers 5.

    transformers 5 keeps everything about rotary embeddings in `rope_parameters`, which 4.57 ignores: it silently uses
    its default base. Keys that transformers 5 would interpret differently are left out.

    Args:
        config: the configuration.
        written: the same as JSON.
        model: the model that it belongs to.
    """
    old = {"torch_dtype": written["dtype"]} if "dtype" in written else {}
    if getattr(config, "tie_word_embeddings", None) is not None:
        old["tie_word_embeddings"] = config.tie_word_embeddings
    rope = _rope(config)
    share = SHARES.get(config.model_type, "partial_rotary_factor")
    if share in rope and not _turns(model, rope[share]):
        del rope[share]
    return {**(rope if rope and _reads_alike(config, {**written, **rope}) else {}), **old, **written}


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding settings under transformers 4's keys; empty if it has no keys for them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    kinds = {name: value for name, value in kinds.items() if "rope_theta" in value}
    base, local = BASES.get(config.model_type, ("rope_theta", None))
    if kinds:
        whole, rest = kinds.get("full_attention", next(iter(kinds.values()))), kinds.get("sliding_attention")
        if rest is not None and local is None and rest["rope_theta"] != whole["rope_theta"]:
            return {}
        found = {local: rest["rope_theta"]} if rest is not None and local is not None else {}
    else:
        whole, found = parameters, {}
    if "rope_theta" not in whole:
        return {}
    found[base] = whole["rope_theta"]
    if (share := whole.get("partial_rotary_factor")) is not None:
        found[SHARES.get(config.model_type, "partial_rotary_factor")] = share
    if whole.get("rope_type", "default") != "default":
        found |= _scaling(config, whole)
    return found


def _turns(model: nn.Module, share: float) -> bool:
    """Whether a model really rotates this share of each head, and not all of it despite its configuration."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    return not turned or int(width * share) in turned


def _scaling(config: Any, whole: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if config.model_type.startswith("phi3"):  # for which 4.57 expects three keys
        wanted = {"type": kept["rope_type"], **{name: kept[name] for name in FACTORS if name in kept}}
    else:
        wanted = kept
    length = kept.get("original_max_position_embeddings")
    beside = {} if kept["rope_type"] != "longrope" or length is None else {"original_max_position_embeddings": length}
    return {"rope_scaling": wanted, **beside}


def _reads_alike(config: Any, values: dict[str, Any]) -> bool:
    """Whether transformers 5 reads the same rotary settings from a config.json."""
    try:
        again = type(config)(**copy.deepcopy(values))  # it modifies its arguments
    except Exception:  # the configuration class of custom code may reject additional keys
        return False
    found = {**(again.rope_parameters or {})}
    found.pop("type", None)  # 4.57's name for `rope_type` in some models
    return found == config.rope_parameters


def _two(model: nn.Module) -> bool:
    """Whether weights that are tied by the configuration are in fact separate."""
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        try:
            if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(other):
                return True
        except AttributeError:  # of a layer that stores its weight in another form
            continue
    return False

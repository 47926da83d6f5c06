"""Causal language models out of what people publish: multimodal, quantized already, or with code of their own."""

from __future__ import annotations

import copy
import difflib
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from trainer.errors import UserError
from trainer.experiment.nodes import Model
from trainer.model_files import first_line

# Where the language model lies in a multimodal file, in transformers 4 and in 5, and its name without the others.
WITHIN = {r"^(?:model\.)?language_model\.model\.": "model.", r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
          r"^model\.language_model\.": "model.", r"^(?:model\.)?text_model\.": "model."}
# What to ask transformers for, so that it gives numbers in full precision; None: it does so by itself, or at the first
# forward.
READABLE: dict[str, Any] = {"compressed-tensors": lambda: None, "bitsandbytes": lambda: None,
                            "fp8": lambda: FineGrainedFP8Config(dequantize=True),
                            "mxfp4": lambda: Mxfp4Config(dequantize=True)}


def language_model(config: PretrainedConfig, model: Model, key: str) -> PretrainedConfig:
    """The configuration of the causal language model that a configuration has or is, its weights in full precision.

    Raises:
        UserError: there is none, or its weights are quantized in a way that cannot be undone here.
    """
    value = model.path or config.model_type
    if not _own_code(config, model):
        config = _text_part(config, key, value)
    missing = [name for name in ("vocab_size", "hidden_size") if not isinstance(getattr(config, name, None), int)]
    layers = getattr(config, "num_hidden_layers", 1)
    if missing or (isinstance(layers, int) and layers < 1):
        raise UserError(f"{key}.path" if model.path else f"{key}.architecture", "its configuration has no "
                        + (" and no ".join(f"`{name}`" for name in missing) or "layers"), value=value,
                        way_out="use another model" + ("" if model.path is None else ", or give it some"))
    if (method := method_of(config)) is not None:
        if method not in READABLE or (method == "bitsandbytes" and find_spec("bitsandbytes") is None):
            raise UserError(f"{key}.path", f"its weights are quantized ({method}), and cannot be turned back into "
                            "numbers of full precision here", value=value,
                            way_out="name the model that it was made from, or save it dequantized first")
        note(f"{key}: its weights are quantized ({method}); they are read as numbers of full precision")
        config = copy.deepcopy(config)
        del config.quantization_config
    return config


def skeleton(config: PretrainedConfig, dtype: torch.dtype, trust: bool = False, key: str = "student") -> nn.Module:
    """A causal language model of this shape; on the current device, its weights say nothing.

    Args:
        trust: whether code that the model brings may run.

    Raises:
        UserError: the shape is none.
    """
    try:
        if detect_fake_mode() is not None:
            return _without_numbers(config, dtype, trust)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    except Exception as error:  # every architecture checks its numbers in its own way, or not at all
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{key}.architecture", f"a {config.model_type} model of these dimensions cannot be made: "
                        f"{said}", way_out="check its dimensions; see the transformers page of this model") from error


def _without_numbers(config: PretrainedConfig, dtype: torch.dtype, trust: bool) -> nn.Module:
    """The same under `FakeTensorMode`, on the current device: made on `meta`, as transformers makes all that it loads.

    Made under the mode, some ask numbers of what has none (ModernBERT draws until all lie within bounds), others change
    a parameter's dtype, which torch refuses there (DeepSeek-V4).
    """
    device, made = torch.get_default_device(), {}
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)

    def without(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # one that is shared stays so
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            held.update({name: without(tensor) for name, tensor in held.items() if isinstance(tensor, torch.Tensor)})
    return model


def learn_padding(model: nn.Module) -> nn.Module:
    """The same model; the row of its padding token learns as any other, where that token is read as text too.

    `nn.Embedding(padding_idx=...)` gives that row no gradient, and the token is the end of a text in many models. What
    only pads is read by no token that is learned, and gets none anyway. What the model computes stays as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not _reads_padding(type(module)):
            module.padding_idx = None
    return model


def _reads_padding(kind: type[nn.Embedding]) -> bool:
    """Whether positions are counted from the padding on, as some do in an embedding of their own."""
    return kind.forward is not nn.Embedding.forward and "padding_idx" in kind.forward.__code__.co_names


def loading(origin: PretrainedConfig, config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`, beside the path, that load the model of `config` from files of `origin`."""
    method, options = method_of(origin), {}
    if type(config) is not type(origin) and not _swapped(origin):
        options["key_mapping"] = WITHIN
    if method is not None:
        config = copy.deepcopy(config)
        config.quantization_config = origin.quantization_config
        if (asked := READABLE[method]()) is not None:
            options["quantization_config"] = asked
    return {**options, "config": config}


@torch.no_grad()
def dense(loaded: nn.Module, config: PretrainedConfig, dtype: torch.dtype, trust: bool, key: str) -> nn.Module:
    """A model of plain weights with the numbers that a quantized one computes with.

    Packed weights of compressed-tensors are taken after a first forward, which unpacks them as it does for any client;
    asked to dequantize while it loads, it takes all layers for one kind.
    """
    if getattr(loaded, "is_loaded_in_4bit", False) or getattr(loaded, "is_loaded_in_8bit", False):
        loaded = loaded.dequantize()
    else:
        loaded.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=loaded.device), use_cache=False)
    model, found = skeleton(config, dtype, trust, key), loaded.state_dict()
    wanted = model.state_dict()
    lacking = [name for name, weight in wanted.items() if name not in found or found[name].shape != weight.shape]
    if lacking:
        raise UserError(f"{key}.path", f"its quantized weights could not be read: {lacking[0]}",
                        way_out="name the model that it was made from, or save it dequantized first")
    model.load_state_dict({name: found[name].to(dtype) for name in wanted})
    model.generation_config = loaded.generation_config
    return model


def method_of(config: PretrainedConfig) -> str | None:
    """How the weights of a published model are quantized, in transformers' word for it."""
    found = getattr(config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if not found:
        return None
    method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "compressed-tensors")
    return str(getattr(method, "value", method))


def _own_code(config: PretrainedConfig, model: Model) -> bool:
    return model.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _text_part(config: PretrainedConfig, key: str, value: str) -> PretrainedConfig:
    """The configuration itself, or its section for text where it is of several modalities."""
    text = config.get_text_config(decoder=True)
    other = type(text) is not type(config)
    if other and not config.is_encoder_decoder and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        if method_of(config) is not None:
            raise UserError(f"{key}.path", "it is multimodal and its weights are quantized", value=value,
                            way_out="save its language model alone, dequantized, and name that")
        note(f"{key}: of this multimodal model the language model alone is used, without what reads images or sound")
        if not _swapped(config) and hasattr(config, "tie_word_embeddings"):
            text.tie_word_embeddings = config.tie_word_embeddings
        text._name_or_path = config._name_or_path
        return text
    if not other and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    names = [one.model_type for one in MODEL_FOR_CAUSAL_LM_MAPPING if not one.sub_configs]
    near = difflib.get_close_matches(config.model_type, names, 2, 0.5)
    what = "encodes one input to write another, which is not trained here" if config.is_encoder_decoder else \
        "is multimodal, and its language model cannot be used alone" if other else \
        "architecture has no causal language model"
    raise UserError(f"{key}.path" if value != config.model_type else f"{key}.architecture.model_type",
                    f"transformers' {config.model_type} {what}", value=value,
                    way_out=f"for example {' or '.join(near)}" if near else "for example llama, qwen3 or gpt2")


def _swapped(config: PretrainedConfig) -> bool:
    """Whether transformers' own automatic class takes the section for text of such a configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(found, "config_class", None) is config.sub_configs.get("text_config")


@cache
def note(text: str) -> None:
    """Said once, however often the configuration is looked at."""
    logging.getLogger(__name__).warning(text)

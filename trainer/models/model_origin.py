"""Gets a dense causal language model from a published model that is multimodal, quantized, or brings its own code."""

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
from transformers import FineGrainedFP8Config, Mxfp4Config, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from strategies.common.generation_settings import copy_generation_settings
from trainer.errors import UserError
from trainer.experiment.model_nodes import Model
from trainer.model_files import first_line
from trainer.models.fitted_inputs import fitting_inputs
from trainer.models.task_heads import auto_class, check_writes

# Prefixes of the language model's weights in multimodal files of transformers 4 and 5, and in a text-only model.
WITHIN = {r"^(?:model\.)?language_model\.model\.": "model.", r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
          r"^model\.language_model\.": "model.", r"^(?:model\.)?text_model\.": "model."}
# The quantization config that makes transformers dequantize while loading. None where that is done afterwards: by
# `dequantize()`, or by the first forward pass.
READABLE: dict[str, Any] = {"compressed-tensors": lambda: None, "bitsandbytes": lambda: None,
                            "fp8": lambda: FineGrainedFP8Config(dequantize=True),
                            "mxfp4": lambda: Mxfp4Config(dequantize=True)}


def language_model(config: PretrainedConfig, model: Model, key: str) -> PretrainedConfig:
    """The configuration of the causal language model that a configuration is or contains, without quantization.

    Raises:
        UserError: there is no such model, it is a classifier, or its weights are quantized by a method that cannot be
            undone here.
    """
    value = model.path or config.model_type
    if model.path is not None:
        check_writes(config, f"{key}.path", model.path)
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
    """A model of this shape with arbitrary weights, on the current default device.

    Args:
        trust: whether code that comes with the model may run.
        key: `student` or `teacher`, for the error message.

    Raises:
        UserError: no model can be built with these dimensions.
    """
    try:
        if detect_fake_mode() is not None:
            return fitting_inputs(_without_numbers(config, dtype, trust))
        return fitting_inputs(auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust))
    except Exception as error:  # architectures validate their dimensions in different ways, or not at all
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{key}.architecture", f"a {config.model_type} model of these dimensions cannot be made: "
                        f"{said}", way_out="check its dimensions; see the transformers page of this model") from error


def _without_numbers(config: PretrainedConfig, dtype: torch.dtype, trust: bool) -> nn.Module:
    """`skeleton` under `FakeTensorMode`: built on `meta`, as transformers builds models that it loads, then made fake.

    Some models cannot be built under the mode itself: ModernBERT redraws weights until all lie within bounds, which
    reads data that fake tensors lack, and DeepSeek-V4 changes a parameter's dtype, which torch refuses there.
    """
    device, made = torch.get_default_device(), {}
    with unset_fake_temporarily(), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)

    def without(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # tied tensors stay tied
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            held.update({name: without(tensor) for name, tensor in held.items() if isinstance(tensor, torch.Tensor)})
    return model


def learn_padding(model: nn.Module) -> nn.Module:
    """Let the embedding of the padding token be trained like any other row; returns the same model.

    `nn.Embedding(padding_idx=...)` gives that row no gradient, but in many models the token also ends a text. Where the
    token only pads, no target depends on it, and the row gets no gradient anyway. The forward pass is unchanged.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and not _reads_padding(type(module)):
            module.padding_idx = None
    return model


def _reads_padding(kind: type[nn.Embedding]) -> bool:
    """Whether an embedding class uses `padding_idx` in its own forward, as some that count positions from it do."""
    return kind.forward is not nn.Embedding.forward and "padding_idx" in kind.forward.__code__.co_names


def loading(origin: PretrainedConfig, config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that load the model of `config` from the files of `origin`."""
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
    """A dense model with the dequantized weights of a quantized one.

    Packed weights of compressed-tensors are read after a first forward pass, which unpacks them as in ordinary use. Its
    option to dequantize while loading treats all layers as one kind.

    Raises:
        UserError: a weight is missing from the loaded model, or has another shape.
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
    copy_generation_settings(loaded, model)
    return model


def method_of(config: PretrainedConfig) -> str | None:
    """The quantization method of a published model, by transformers' name for it; None if it is not quantized."""
    found = getattr(config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if not found:
        return None
    method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "compressed-tensors")
    return str(getattr(method, "value", method))


def _own_code(config: PretrainedConfig, model: Model) -> bool:
    return model.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _text_part(config: PretrainedConfig, key: str, value: str) -> PretrainedConfig:
    """The configuration itself, or the text section of a multimodal one.

    Raises:
        UserError: it has no causal language model that can be used here.
    """
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
    """Whether transformers' own auto class replaces such a configuration by its text section."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(found, "config_class", None) is config.sub_configs.get("text_config")


@cache
def note(text: str) -> None:
    """Log a warning once, however often the configuration is read."""
    logging.getLogger(__name__).warning(text)

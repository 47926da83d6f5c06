"""How wide the outputs of a model's layers are: blocks of a transformer, or stages of a convolutional net."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from transformers import PretrainedConfig

from strategies.distillation.losses.recorder import stages_of
from trainer.errors import error_context
from trainer.models.model_origin import skeleton


def has_maps(config: PretrainedConfig) -> bool:
    """Whether layers put out maps (batch, channels, height, width), as those of convolutional nets do."""
    return getattr(config, "num_hidden_layers", None) is None


def layer_widths(config: PretrainedConfig) -> list[int]:
    """The hidden size for each block of a transformer; the channels that each stage of a convolutional net puts out.

    Raises:
        UserError: the model has neither blocks nor stages.
    """
    if not has_maps(config):
        return [config.hidden_size] * config.num_hidden_layers
    return list(_channels(type(config), config.to_json_string(use_diff=False)))


@lru_cache(maxsize=8)
def _channels(kind: type[PretrainedConfig], values: str) -> tuple[int, ...]:
    """Found by running a model of these dimensions from shapes alone."""
    config = kind.from_dict(json.loads(values))
    found: list[int] = []
    with error_context("objective.features", value=config.model_type, way_out="leave it out"), torch.device("meta"), \
            torch.no_grad():
        model = skeleton(config, torch.float32, key="student").eval()
        for stage in stages_of(model)[1]:
            stage.register_forward_hook(lambda _, __, output: found.append(
                (output[0] if isinstance(output, tuple) else output).shape[1]))
        model(pixel_values=torch.zeros(2, config.num_channels, config.image_size, config.image_size))
    return tuple(found)

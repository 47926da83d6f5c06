"""The configuration of a student that is cut before it is trained, from shapes alone."""

from __future__ import annotations

from transformers import PretrainedConfig

from strategies.pruning.structured.config_steps import cut_config
from trainer.experiment.pruning_nodes import Prune, pruning_errors
from trainer.models.layer_settings import with_layers


def pruned_config(prune: Prune | None, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration after the cut; the same if nothing is cut.

    Raises:
        UserError: the configuration cannot say the numbers asked for.
    """
    if prune is None:
        return config
    with pruning_errors(prune):
        return cut_config(config, prune.build(), some_layers)


def some_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """The configuration with some of its layers; raises ValueError where they make no model of their own."""
    return with_layers(config, layers)[0]

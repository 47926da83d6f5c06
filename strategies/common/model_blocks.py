"""Finds the blocks of a transformer: the list of modules that its hidden states go through one after the other."""

from __future__ import annotations

from torch import nn


def block_count(model: nn.Module) -> int | None:
    """How many blocks a model has by its configuration; None for one without blocks, such as a convolutional net.

    Raises:
        ValueError: it has no configuration.
    """
    config = next((module.config for module in model.modules() if hasattr(module, "config")), None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no configuration that says how many blocks to look for; give a "
                         "model of transformers")
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def block_list(model: nn.Module) -> str:
    """Name of the one `ModuleList` of a model, not inside of another, that is as long as its configuration says.

    Raises:
        ValueError: there is none, or more than one, as in an encoder with a decoder.
    """
    count, name = block_count(model), type(model).__name__
    if count is None:
        raise ValueError(f"{name} has no list of blocks: its configuration has no num_hidden_layers")
    found, inside = [], ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            if len(module) == count:
                found.append(path)
    if len(found) != 1:
        raise ValueError(f"{name}: looked for one list of {count} blocks, and found "
                         f"{', '.join(found) or 'none'}; give the part that has one, for example model.get_encoder()")
    return found[0]

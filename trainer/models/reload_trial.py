"""Tests that transformers loads a model with the weights that it saved."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from strategies.export.hf.saved_names import as_saved
from trainer.errors import UserError
from trainer.model_files import first_line
from trainer.models.architecture_keys import set_token


def check_reload(model: nn.Module, key: str, path: str | None = None) -> None:
    """Raise `UserError` if a model does not survive saving and loading, so that an exported student would differ.

    Youtu's code, for example, zeroes the padding token's row whenever a model is loaded. If embeddings and head are
    tied, that row is trained, and the deployed student would differ from the trained one.

    Args:
        model: a small trial model; its weights are changed.
        key: `student`.
        path: where the configuration comes from; None for dimensions in the experiment.
    """
    where = f"{key}.path" if path else f"{key}.architecture"
    try:
        name = _changed_by_loading(model)
    except Exception as error:  # model code can raise anything
        raise UserError(where, f"transformers cannot load what it saves of {type(model).__name__}, so that nobody "
                        f"could use a student: {first_line(error)}", value=path or model.config.model_type,
                        way_out="name another architecture") from error
    if name is None:
        return
    padded = model.config.pad_token_id is not None
    model.config = copy.deepcopy(model.config)
    set_token(model.config, "pad_token_id", None, model.config.pad_token_id)
    helps = padded and model.config.pad_token_id is None and _changed_by_loading(model) is None
    raise UserError(where, f"transformers loads {name} of {type(model).__name__} otherwise than it saves it, so that a "
                    "student would not be the one that was trained", value=path or model.config.model_type,
                    way_out='write "pad_token_id": null into its config.json' if helps and path else
                    "leave `pad_token_id` out" if helps else "name another architecture")


@torch.no_grad()
def _changed_by_loading(model: nn.Module) -> str | None:
    """The name of a weight that changes when it is saved and loaded, or None.

    Adds noise to all weights first, so that none is left at its initial value.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) / 8)
    # In memory and not in a folder, so that a full disk is not taken for a fault of the model.
    tensors = {name: tensor.clone().contiguous() for name, tensor in as_saved(model, model.state_dict()).items()}
    written = model.config.to_dict()
    config = AutoConfig.for_model(written.pop("model_type"), **written)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"it has no causal model for {config.model_type}, which is what config.json would say")
    loaded = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).state_dict()
    return next((name for name, weight in model.state_dict().items()
                 if name in loaded and not torch.equal(weight, loaded[name])), None)

"""A trial of transformers' own way to and from its files: that a model comes back as it was saved."""

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
    """Raise `UserError` where transformers does not load what it saves of such a model, whose student would be another.

    Youtu's code sets the padding token's row to zero whenever a model is loaded; where that row is in the head as well
    it is trained, and the student that is served has others than the one in training.

    Args:
        model: a small one, made for trials; its weights are moved.
        key: `student`.
        path: where its configuration comes from; None for dimensions in the experiment.
    """
    where = f"{key}.path" if path else f"{key}.architecture"
    try:
        name = _changed_by_loading(model)
    except Exception as error:  # of every kind: code of each model's own
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
    """The name of a weight that comes back otherwise; none of them is then as it was begun."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) / 8)
    # Without a folder: a full disk says nothing about a model.
    tensors = {name: tensor.clone().contiguous() for name, tensor in as_saved(model, model.state_dict()).items()}
    written = model.config.to_dict()
    config = AutoConfig.for_model(written.pop("model_type"), **written)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"it has no causal model for {config.model_type}, which is what config.json would say")
    loaded = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).state_dict()
    return next((name for name, weight in model.state_dict().items()
                 if name in loaded and not torch.equal(weight, loaded[name])), None)

"""Trial runs of a classifier before training: it gives one row of class scores, and padding does not change them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from strategies.common.model_tasks import task_of
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.model_nodes import Model
from trainer.model_files import first_line
from trainer.models.model_origin import skeleton

SMALL = 1e8  # most weights of a model that is tried before its data are read
SHORT, LONG = 6, 11  # tokens of a text, and of the same text padded
CLOSE = 2e-2  # largest change of the scores by padding, relative to the largest score


def check_early_classifier(asked: Model, key: str, config: PretrainedConfig) -> None:
    """Try a classifier of these dimensions with random weights, if it is small enough for that.

    Raises:
        UserError: it cannot be made, or cannot run.
    """
    if asked.trust_remote_code:
        return
    with torch.device("meta"):
        many = sum(one.numel() for one in skeleton(copy.deepcopy(config), torch.float32, key=key).parameters())
    if many > SMALL:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _try(skeleton(copy.deepcopy(config), torch.float32, key=key), key, asked.path)


def check_classifier(model: nn.Module, key: str, data: Data, path: str | None) -> None:
    """Raise `UserError` if a classifier cannot run on the rows of this data as its training needs it."""
    _try(model, key, path)
    if data.task == "image_classification":
        return
    _try_length(model, data.sequence_length)
    with torch.no_grad(), _Evaluated(model):
        short, padded = (model(**_texts(model, length)).logits.float() for length in (SHORT, LONG))
    padded = padded[:, :SHORT] if short.ndim == 3 else padded
    if not (short - padded).abs().max() <= CLOSE * short.abs().max():
        raise UserError(f"{key}.path" if path else f"{key}.architecture", f"what {type(model).__name__} says of a text "
                        "depends on the padding behind it", value=path or model.config.model_type,
                        way_out="name another model")


@torch.no_grad()
def _try_length(model: nn.Module, length: int) -> None:
    """Raise `UserError` if a classifier that reads short texts cannot read one of a length."""
    inputs = {name: tensor[:1] for name, tensor in _texts(model, length, length).items()}
    try:
        with _Evaluated(model):
            model(**inputs)
    except Exception as error:  # foreign model code can raise anything
        raise UserError("data.sequence_length", f"{type(model).__name__} cannot read texts so long: "
                        f"{first_line(error)}", value=length, way_out="lower it: some models read a few tokens less "
                        "than their max_position_embeddings") from error


@torch.no_grad()
def _try(model: nn.Module, key: str, path: str | None) -> None:
    where = f"{key}.path" if path else f"{key}.architecture"
    try:
        with _Evaluated(model):
            inputs = example_inputs(model)
            scores = model(**inputs).logits
    except Exception as error:  # foreign model code on user-given dimensions can raise anything
        raise UserError(where, f"{type(model).__name__} cannot run: {first_line(error)}",
                        value=path or model.config.model_type,
                        way_out="check the dimensions of its architecture, and data.images.size for images") from error
    rows = len(next(iter(inputs.values())))
    if scores.shape[0] != rows or scores.shape[-1] != model.config.num_labels:
        raise UserError(where, f"{type(model).__name__} gives scores of shape {tuple(scores.shape)} for {rows} rows "
                        f"and {model.config.num_labels} classes", value=path or model.config.model_type,
                        way_out="name another model")


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward of a classifier, by its configuration: two rows."""
    device = next(one.device for one in model.parameters() if one.device.type != "meta")
    if task_of(model.config) == "image_classification":
        size = model.config.image_size if hasattr(model.config, "image_size") else 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        count = 2 * model.config.num_channels * height * width
        values = torch.sin(torch.arange(count, device=device, dtype=torch.float32))
        return {"pixel_values": values.view(2, model.config.num_channels, height, width)}
    return _texts(model, SHORT)


def _texts(model: nn.Module, length: int, own: int = SHORT) -> dict[str, torch.Tensor]:
    """Two texts of `own` tokens, padded to a length."""
    device = next(one.device for one in model.parameters() if one.device.type != "meta")
    size, padding = model.config.get_text_config().vocab_size, model.config.get_text_config().pad_token_id
    ids = torch.arange(2 * own, device=device).view(2, own) % size
    if padding is not None:
        ids = torch.where(ids == padding, (padding + 1 + SHORT) % size, ids)
    row = torch.full((2, length), 0 if padding is None else padding, device=device)
    row[:, :own] = ids
    mask = (torch.arange(length, device=device) < own).long().expand(2, -1)
    return {"input_ids": row, "attention_mask": mask}


class _Evaluated:
    """Context manager in which a model is in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mode = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        self.model.train(self.mode)

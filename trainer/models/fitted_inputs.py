"""Classifiers take what the rows of a run have: segments that they do not know, and images in another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from strategies.common.model_tasks import takes_segments, task_of


def fitting_inputs(model: nn.Module) -> nn.Module:
    """The same model, which takes the rows of a run if it is a classifier.

    It ignores `token_type_ids` of pairs of texts if it does not know them, which others of a run need. If its weights
    are in half precision it casts images to them, which vision transformers do and convolutional nets do not.
    """
    task, dtype = task_of(model.config), next((one.dtype for one in model.parameters()), torch.float32)
    hooks = model._forward_pre_hooks.values()
    if task in ("sequence_classification", "token_classification") and not takes_segments(
            model.config) and _drop not in hooks:
        model.register_forward_pre_hook(_drop, with_kwargs=True)
    if task == "image_classification" and dtype != torch.float32 and not any(isinstance(one, _Cast) for one in hooks):
        model.register_forward_pre_hook(_Cast(dtype), with_kwargs=True)
    return model


def _drop(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in given.items() if name != "token_type_ids"}


class _Cast:
    """Casts images to a dtype before a forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
                 ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value.to(self.dtype) if name == "pixel_values" else value for name, value in given.items()}

"""Classifiers of pairs of texts that have no segments: they ignore `token_type_ids`, which others of a run need."""

from __future__ import annotations

from typing import Any

from torch import nn

from strategies.common.model_tasks import takes_segments, task_of


def ignoring_segments(model: nn.Module) -> nn.Module:
    """The same model, which ignores `token_type_ids` if it is a classifier that does not know them."""
    if task_of(model.config) in ("sequence_classification", "token_classification") and not takes_segments(
            model.config) and _drop not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_drop, with_kwargs=True)
    return model


def _drop(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in given.items() if name != "token_type_ids"}

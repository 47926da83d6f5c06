"""Which weights of a model are pruned: those of its linear layers, convolutions and experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strategies.common.frozen_base import has_adapters
from strategies.common.stored_weights import Experts, all_layers

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D, Experts)


def prunable(model: nn.Module, ignore: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """The layers of a model that are pruned, by name. Layers that share a weight come once.

    Embeddings are left alone, and so are heads that share their weights. Of a model with adapters, these are layers of
    the frozen base.

    Args:
        model: any module.
        ignore: shell-style patterns of names to leave alone.

    Raises:
        ValueError: there is no such layer, or a pattern matches none.
    """
    adapted = has_adapters(model)
    layers = {name: layer for name, layer in all_layers(model)
              if isinstance(layer, KINDS) and not (adapted and layer.weight.requires_grad)}
    for pattern in ignore:
        # `lm_head` is the default pattern, so a model without one is no mistake.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"the pattern {pattern!r} in `ignore` matches no layer; names look like "
                             f"{', '.join(list(layers)[:3])}")
    taken = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen = {}
    for name, layer in layers.items():
        if id(layer.weight) not in taken and not any(fnmatchcase(name, pattern) for pattern in ignore):
            taken.add(id(layer.weight))
            chosen[name] = layer
    if not chosen:
        raise ValueError(f"there is no layer to prune outside of {list(ignore)}")
    return chosen


def weight_names(model: nn.Module, layers: Mapping[str, Any]) -> list[str]:
    """Names of the parameters in which layers have their weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [names[id(layer.weight)] for layer in layers.values()]


def rows_of(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """Numbers of a layer's weights, in the shape of its parameter, as (outputs, inputs)."""
    if isinstance(layer, Conv1D):
        return values.T
    return values.flatten(0, 1) if isinstance(layer, Experts) else values.flatten(1)


def as_stored(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Convert (outputs, inputs) of `rows_of` back to the shape of the layer's parameter."""
    return rows.T if isinstance(layer, Conv1D) else rows.view(layer.weight.shape)

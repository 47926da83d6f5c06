"""Winning tickets: a network that is trained again from an early step, without the weights that ended up smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from strategies.pruning.unstructured.prunable_layers import as_stored, prunable, rows_of, weight_names
from strategies.pruning.unstructured.sparsity_pattern import Pattern


@torch.no_grad()
def winning_ticket(model: nn.Module, trained: Callable[[str], torch.Tensor], *, sparsity: float | None = None,
                   pattern: str | None = None, ignore: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """Set the weights of a rewound model to zero, in place, that are smallest in the trained one.

    One round of iterative magnitude pruning (Frankle and Carbin 2019, arXiv 1803.03635, section 1; survey eq. 6):
    m = the mask of the largest weights that training has found, and the next training starts from m * theta_k, with
    theta_k the weights of an early step k (Frankle et al. 2020, arXiv 1912.05671; k = 0 in the first paper). Weights
    that an earlier round pruned are zero in the trained model, and so the first to go.

    Args:
        model: with the weights of the early step.
        trained: returns a parameter of the trained model, by its name, in the same shape.
        sparsity, pattern, ignore: see `one_shot`.

    Returns:
        The record, as of `one_shot`; "error" is None.

    Raises:
        ValueError: as `one_shot`; or a parameter of the trained model is missing or has another shape.
    """
    wanted, chosen = Pattern.parse(sparsity, pattern), prunable(model, ignore)
    for name, layer in chosen.items():
        wanted.check(rows_of(layer, layer.weight).shape[1], name)
    layers: dict[str, dict[str, Any]] = {}
    for (name, layer), weight_name in zip(chosen.items(), weight_names(model, chosen), strict=True):
        weight = layer.weight
        found = trained(weight_name)
        if found.shape != weight.shape:
            raise ValueError(f"{weight_name} has shape {tuple(weight.shape)}, and {tuple(found.shape)} in the trained "
                             "model")
        mask = as_stored(layer, wanted.largest(rows_of(layer, found).float().abs()))
        weight.masked_fill_(~mask.to(weight.device), 0.0)
        layers[name] = {"method": "lottery", "weights": weight.numel(), "error": None,
                        "sparsity": float((weight == 0).double().mean())}
    zeros = sum(layer["weights"] * layer["sparsity"] for layer in layers.values())
    return {"method": "lottery", "pattern": str(wanted), "sparsity": zeros / sum(
        layer["weights"] for layer in layers.values()), "layers": layers}

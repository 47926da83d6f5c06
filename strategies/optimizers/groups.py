"""Parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, each once, in one group with weight decay and one without; empty groups are left out.

    Parameters with fewer than two dimensions (norms and biases) do not decay, because shrinking a gain or an offset
    toward zero regularizes nothing. Neither do embeddings, including a tied output head: a token absent from the batch
    has no gradient and would only shrink.

    Returns:
        `param_groups` for any torch optimizer: "params", "weight_decay", and "names" of the parameters in the model.
    """
    embeddings = embedding_weights(model)
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():  # names a tied parameter once
        if parameter.requires_grad:
            (decayed if dimensions(parameter) >= 2 and id(parameter) not in embeddings else others).append(
                (name, parameter))
    return [group_of(named, decay) for named, decay in ((decayed, weight_decay), (others, 0.0)) if named]


def group_of(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> dict[str, Any]:
    """A parameter group for an optimizer."""
    return {"params": [parameter for _, parameter in named], "names": [name for name, _ in named],
            "weight_decay": weight_decay}


def embedding_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of all embeddings."""
    return {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}


def dimensions(parameter: torch.Tensor) -> int:
    """Number of dimensions of the whole parameter; under ZeRO 3 DeepSpeed empties it and keeps `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))

"""Tells the weights of a frozen base, which has files of its own, from those of the adapters that are trained on it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from strategies.common.tensor_digest import PART, tensor_digest


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model have low-rank adapters of peft."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def base_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of the base beneath a model's adapters; empty for a model without adapters.

    Without adapters, parameters that are not trained (fixed position embeddings, for example) belong to the model like
    all others.
    """
    if not has_adapters(model):
        return frozenset()
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def base_digests(model: nn.Module, computed: bool = True) -> dict[str, str]:
    """SHA-256 of each parameter of the base beneath a model's adapters, by name; "" if they are not `computed`."""
    names = base_names(model)
    return {name: tensor_digest(parameter, [parameter.detach().reshape(-1)]) if computed else ""
            for name, parameter in model.named_parameters() if name in names}


def base_digest(model: nn.Module) -> str | None:
    """SHA-256 of the base beneath a model's adapters, names and numbers as they are held; None without adapters."""
    names = base_names(model)
    if not names:
        return None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in names:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
            for part in parameter.detach().reshape(-1).split(PART):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

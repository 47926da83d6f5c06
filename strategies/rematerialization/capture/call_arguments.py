"""What a call of a region is given: whether it takes part in the backward, and arguments that a plan leaves out."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_flatten


def takes_part(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a gradient will flow back through this call of a module."""
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
        return True  # at once: to flatten all arguments takes longer than many kernels
    return (any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_flatten((args, kwargs))[0])
            or any(parameter.requires_grad for parameter in module.parameters()))


def without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments without transformers' key-value cache.

    The cache would hold tensors that are to be recomputed, and would be appended to twice. transformers' own activation
    checkpointing drops it as well.
    """
    def is_cache(value: object) -> bool:
        return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.")
                   for kind in type(value).__mro__)

    args = tuple(None if is_cache(value) else value for value in args)
    dropped = {name: None for name, value in kwargs.items() if is_cache(value)}
    if dropped and kwargs.get("use_cache"):
        dropped["use_cache"] = False
    return args, {**kwargs, **dropped}

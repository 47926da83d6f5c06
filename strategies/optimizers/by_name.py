"""Build an optimizer by name."""

from __future__ import annotations

import torch
from torch import nn

ZERO_EPS = {"lamb": 1e-6}  # default eps that differ from 1e-8, the value in most papers


def build(model: nn.Module, name: str, *, lr: float, betas: tuple[float, float], eps: float | None,
          weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer called `name` for a model's trainable parameters, in groups with and without weight decay.

    Args:
        model: the model.
        name: adamw, lamb, adafactor, muon or adamw8bit.
        lr: learning rate.
        betas: decay rates of the running means of the gradient and of its square; the first is Muon's momentum.
        eps: added to the denominator; None for the paper's value.
        weight_decay: decoupled, for matrices that are not embeddings.

    Raises:
        ValueError: there is no such optimizer, or it is not installed.
    """
    eps = ZERO_EPS.get(name, 1e-8) if eps is None else eps
    if name == "muon":
        from strategies.optimizers.muon import muon

        return muon(model, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    from strategies.optimizers.groups import parameter_groups

    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        from strategies.optimizers.adamw import adamw

        return adamw(groups, lr=lr, betas=betas, eps=eps)
    if name == "lamb":
        from strategies.optimizers.lamb import Lamb

        return Lamb(groups, lr=lr, betas=betas, eps=eps)
    if name == "adafactor":
        from strategies.optimizers.adafactor import Adafactor

        return Adafactor(groups, lr=lr)
    if name == "adamw8bit":
        from strategies.optimizers.adamw8bit import adamw8bit

        return adamw8bit(groups, lr=lr, betas=betas, eps=eps)
    raise ValueError(f"there is no optimizer {name!r}")

"""LAMB for sharded parameters: its trust ratios are those of whole layers, however they are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from strategies.common.shards import add_over, layout_of, local, local_of
from strategies.optimizers.norms import begun, check, evaluated, flat_gradient, squared_norm, wide, with_gradient
from strategies.optimizers.transient import Sharing, traced


@dataclass
class _Part:
    """A rank's elements of one parameter, as flat views, and the scalars of its step."""

    key: Any
    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    corrections: tuple[torch.Tensor, torch.Tensor]
    settings: dict[str, Any]


class Lamb(torch.optim.Optimizer):
    """Layerwise adaptive moments (You et al. 2020, arXiv 1904.00962, algorithm 2), with bias correction.

    With x a layer's weights and g its gradient:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        x = x - lr phi(||x||) / ||r + weight_decay x|| (r + weight_decay x)

    `phi` is the identity. The paper also allows a bounded phi, which limits ||x||, at 10 in some implementations, and
    so stops a large layer from learning in proportion to its norm; `max_trust_ratio` limits the ratio instead. The
    ratio is 1 where either norm is 0. Norms are of whole parameters: the partial sums of squares of all pieces in a
    step are reduced in one all-reduce per group of ranks. Padding between pieces is never touched.

    A step needs memory for one update at a time. For sharded weights each update is computed twice, before and after
    the norms are known, rather than kept for all weights. Nothing waits for the device.

    State per tensor: `step` (scalar, on the tensor's device), `exp_avg` and `exp_avg_sq`, shaped as the rank's part.

    Args:
        max_trust_ratio: upper bound of the trust ratio; None for no bound.

    Attributes:
        trust_ratios: scalar tensors from the last step of each parameter, by its name in the layout or, without a name,
            by (tensor, number of the piece in its layout).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0, *, max_trust_ratio: float | None = None) -> None:
        check(lr, weight_decay, betas)
        if not eps >= 0:
            raise ValueError(f"eps = {eps}: what is added to a denominator is not negative")
        if max_trust_ratio is not None and not max_trust_ratio > 0:
            raise ValueError(f"max_trust_ratio = {max_trust_ratio}: a bound of trust ratios is above 0")
        self.trust_ratios: dict[Any, torch.Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "max_trust_ratio": max_trust_ratio})

    def fresh_state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a tensor before its first step."""
        own = local(tensor)
        return {"step": torch.zeros((), device=own.device), "exp_avg": torch.zeros_like(own),
                "exp_avg_sq": torch.zeros_like(own)}

    gathers_updates = False

    def transient_bytes(self, sharing: Sharing) -> int:
        """An update beside the one before, and what norms need, as traced; kernels here allocate nothing."""
        return traced(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient. All ranks of a group must take part, with the same parameters.

        Raises:
            ValueError: a gradient is sparse, or a parameter is not contiguous or is sharded in a way `layout_of`
                rejects.
        """
        loss = evaluated(closure)
        shared: dict[Any, list[_Part]] = {}
        for tensor, settings in with_gradient(self.param_groups):
            parts, group = self._parts(tensor, settings)
            if group is not None:
                shared.setdefault(group, []).extend(parts)
                continue
            for part in parts:
                update = _direction(part)
                self._apply(part, update, _norms(part, update))
        for group, parts in shared.items():
            norms = torch.stack([_norms(part, _direction(part)) for part in parts])
            add_over(group, [norms])
            for part, norm in zip(parts, norms, strict=True):
                self._apply(part, _direction(part), norm)
        return loss

    def _parts(self, tensor: torch.Tensor, settings: dict[str, Any]) -> tuple[list[_Part], Any]:
        """The pieces of a tensor, with updated moments, and the group of ranks that share it."""
        state = begun(self, tensor)
        state["step"] += 1
        gradient, layout, weight = flat_gradient(tensor), layout_of(tensor), local_of(tensor)
        moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        first, second = (_correction(beta, state["step"]) for beta in settings["betas"])
        parts = []
        for number, piece in enumerate(layout.pieces):
            mean, square = (piece.of(moment) for moment in moments)
            _advance(mean, square, piece.of(gradient), *settings["betas"])
            parts.append(_Part(piece.name or (tensor, number), piece.of(weight), mean, square, (first, second),
                               settings))
        return parts, layout.group

    def _apply(self, part: _Part, update: torch.Tensor, norms: torch.Tensor) -> None:
        """Take the step of algorithm 2, line 13. `norms`: [2], squared, of the whole weight and of the whole update."""
        ratio = torch.where((norms > 0).all(), (norms[0] / norms[1]).sqrt(), 1.0)
        if part.settings["max_trust_ratio"] is not None:
            ratio = ratio.clamp(max=part.settings["max_trust_ratio"])
        self.trust_ratios[part.key] = ratio
        part.weight.addcmul_(update, (ratio * part.settings["lr"]).to(update.dtype), value=-1)


def _advance(mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor, beta1: float, beta2: float) -> None:
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


def _correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """1 - beta^step; the plain difference loses most digits in fp32 while beta^step is near 1."""
    return -torch.expm1(step.to(wide(step.device)) * (math.log(beta) if beta else -math.inf))


def _direction(part: _Part) -> torch.Tensor:
    """r + weight_decay x, flat, as a new tensor."""
    first, second = part.corrections
    scale, eps = (value.to(part.weight.dtype) for value in (first / second.sqrt(), first * part.settings["eps"]))
    update = part.exp_avg_sq.sqrt().mul_(scale).add_(eps)
    torch.div(part.exp_avg, update, out=update)
    if part.settings["weight_decay"]:
        update.add_(part.weight, alpha=part.settings["weight_decay"])
    return update


def _norms(part: _Part, update: torch.Tensor) -> torch.Tensor:
    """[2]: the rank's share of the squared norms of weight and update."""
    return torch.stack([squared_norm(part.weight), squared_norm(update)])

"""LAMB for sharded parameters: its trust ratios are those of whole layers, however they are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.common.shards import Layout, add_over, layout_of, local, local_of
from strategies.optimizers import lamb_passes
from strategies.optimizers.norms import begun, check, evaluated, flat_gradient, squared_norm, wide, with_gradient
from strategies.optimizers.passes import Compiles, is_together, passable
from strategies.optimizers.step_batches import batches, chunks, zeros_for
from strategies.optimizers.transient import Sharing, traced


@dataclass
class _Part:
    """A rank's elements of one parameter, as flat views.

    Attributes:
        key: names it in `trust_ratios`.
        gradient: None once the moments are those of this step.
        step: number of this step, a scalar tensor.
        group: ranks that hold the other elements.
        compiled: whether compiled passes step it.
    """

    key: Any
    weight: torch.Tensor
    gradient: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    settings: dict[str, Any]
    group: Any
    compiled: bool


class Lamb(Compiles, torch.optim.Optimizer):
    """Layerwise adaptive moments (You et al. 2020, arXiv 1904.00962, algorithm 2), with bias correction.

    With x a layer's weights and g its gradient:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        x = x - lr phi(||x||) / ||r + weight_decay x|| (r + weight_decay x)

    `phi` is the identity. The paper also allows a bounded phi, which limits ||x||, at 10 in some implementations, and
    so stops a large layer from learning in proportion to its norm; `max_trust_ratio` limits the ratio instead. The
    ratio is 1 where either norm is 0. Norms are of whole parameters: the partial sums of squares of all pieces in a
    step are reduced in one all-reduce per group of ranks. Padding between pieces is never touched.

    Large fp32 models on CPU are stepped by compiled passes (`kernels`): one for moments and norms, one for the weights.
    Elsewhere torch's fused kernel of Adam, whose moments and r are the same, computes them in one pass, with a step of
    rate 1 from zeros: what it writes there is -r. That needs memory for one such update, at most as large as the
    largest part; smaller ones share it. For sharded weights each update is computed twice, before and after the norms
    are known, rather than kept for all weights. Nothing waits for the device.

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
        self.compiled = self.compiles(self.param_groups)

    def fresh_state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a tensor before its first step."""
        own = local(tensor)
        return {"step": torch.zeros((), device=own.device), "exp_avg": torch.zeros_like(own),
                "exp_avg_sq": torch.zeros_like(own)}

    gathers_updates = False

    def transient_bytes(self, sharing: Sharing) -> int:
        """An update, and what norms need, as traced; kernels here allocate nothing."""
        with self.planned(sharing.on_cpu):
            return traced(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient. All ranks of a group must take part, with the same parameters.

        Raises:
            ValueError: a gradient is sparse, or a parameter is not contiguous or is sharded in a way `layout_of`
                rejects.
        """
        loss = evaluated(closure)
        table, rest = lamb_passes.Table(), []
        for tensor, settings in with_gradient(self.param_groups):
            layout, state = layout_of(tensor), begun(self, tensor)
            state["step"] += 1
            if self.compiled and passable(tensor, state) and is_together(layout):
                lamb_passes.add_whole(table, tensor, state, layout, settings)
            else:
                rest.append((tensor, settings, layout))
        self._step_together(table)
        shared: dict[Any, list[tuple[list[_Part], torch.Tensor]]] = {}
        for parts in self._batches(rest):
            if parts[0].group is None:
                self._step_whole(parts)
            else:
                shared.setdefault(parts[0].group, []).append((parts, _shares(parts)))
        for group, found in shared.items():
            add_over(group, [norms for _, norms in found])
            for parts, norms in found:
                self._step_shared(parts, norms)
        return loss

    def _step_together(self, table: lamb_passes.Table) -> None:
        ratios = lamb_passes.step_whole(table)
        for (tensor, number), ratio in zip(table.owners, ratios.unbind(), strict=True):
            self.trust_ratios[layout_of(tensor).pieces[number].name or (tensor, number)] = ratio
        torch.autograd.graph.increment_version([local(tensor) for tensor, number in table.owners if number == 0])

    def _batches(self, found: Sequence[tuple[torch.Tensor, dict[str, Any], Layout]]) -> Iterator[list[_Part]]:
        """The pieces of tensors, whose steps have been counted, in batches, which are made one by one."""
        largest = max((piece.numel for _, _, layout in found for piece in layout.pieces), default=0)
        return batches((part for each in found for part in self._parts(*each)), largest)

    def _parts(self, tensor: torch.Tensor, settings: dict[str, Any], layout: Layout) -> Iterator[_Part]:
        """The pieces of a tensor."""
        state = self.state[tensor]
        gradient, weight = flat_gradient(tensor), local_of(tensor)
        mean, square = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for number, piece in enumerate(layout.pieces):
            yield _Part(piece.name or (tensor, number), piece.of(weight), piece.of(gradient), piece.of(mean),
                        piece.of(square), state["step"], settings, layout.group,
                        self.compiled and passable(tensor, state))

    def _step_whole(self, parts: Sequence[_Part]) -> None:
        """Step parts that are whole parameters: each is still in a cache when its norms are known."""
        if parts[0].compiled:  # they are large
            for part in parts:
                self._step_shared([part], lamb_passes.advance([part]))
            return
        updates = _advanced(parts)
        ratios = _ratios(_norms(parts, updates), parts[0].settings)
        torch._foreach_addcmul_([part.weight for part in parts], updates,
                                list(_rates(parts, ratios).unbind()))
        self._finish(parts, ratios)

    def _step_shared(self, parts: Sequence[_Part], norms: torch.Tensor) -> None:
        """Step parts whose moments are this step's. `norms`: [parts, 2], squared, of whole weights and updates."""
        ratios = _ratios(norms, parts[0].settings)
        rates = _rates(parts, ratios)
        if parts[0].compiled:
            lamb_passes.apply(parts, rates)
        else:
            for part, rate in zip(parts, rates.unbind(), strict=True):
                scale, eps = _scales(part)
                for span in chunks(part.weight):
                    part.weight[span].addcmul_(_direction(part, span, scale, eps), rate, value=-1)
        self._finish(parts, ratios)

    def _finish(self, parts: Sequence[_Part], ratios: torch.Tensor) -> None:
        self.trust_ratios.update(zip((part.key for part in parts), ratios.unbind(), strict=True))
        if parts[0].compiled:  # which autograd does not see
            torch.autograd.graph.increment_version([part.weight for part in parts])


# ---- a batch of parts at once

def _shares(parts: Sequence[_Part]) -> torch.Tensor:
    """Advance the moments. [parts, 2]: the rank's share of the squared norms of weights and updates."""
    return lamb_passes.advance(parts) if parts[0].compiled else _norms(parts, _advanced(parts))


def _advanced(parts: Sequence[_Part]) -> list[torch.Tensor]:
    """Advance the moments; new flat tensors -(r + weight_decay x)."""
    settings = parts[0].settings
    updates = zeros_for([part.weight for part in parts])
    beta1, beta2 = settings["betas"]
    slopes = [part.gradient for part in parts if part.gradient is not None]
    torch._fused_adam_(updates, slopes, [part.exp_avg for part in parts],
                       [part.exp_avg_sq for part in parts], [], [part.step for part in parts], lr=1.0, beta1=beta1,
                       beta2=beta2, eps=settings["eps"], weight_decay=0.0, amsgrad=False, maximize=False)
    if settings["weight_decay"]:
        torch._foreach_add_(updates, [part.weight for part in parts], alpha=-settings["weight_decay"])
    for part in parts:
        part.gradient = None  # a copy, if there is one, is not kept until the norms are known
    return updates


def _norms(parts: Sequence[_Part], updates: Sequence[torch.Tensor]) -> torch.Tensor:
    """[parts, 2]: squared norms of weights and updates."""
    return torch.stack([squared_norm(flat) for part, update in zip(parts, updates, strict=True)
                        for flat in (part.weight, update)]).view(-1, 2)


def _ratios(norms: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """[parts]: trust ratios, given squared norms [parts, 2] of whole weights and updates."""
    ratios = torch.where((norms > 0).all(1), (norms[:, 0] / norms[:, 1]).sqrt(), 1.0)
    return ratios if settings["max_trust_ratio"] is None else ratios.clamp(max=settings["max_trust_ratio"])


def _rates(parts: Sequence[_Part], ratios: torch.Tensor) -> torch.Tensor:
    """[parts]: factors of the updates by algorithm 2, line 13."""
    return (ratios * parts[0].settings["lr"]).to(parts[0].weight.dtype)


def _scales(part: _Part) -> tuple[torch.Tensor, torch.Tensor]:
    """c and e such that mean / (c sqrt(square) + e) is r."""
    first, second = (_correction(beta, part.step) for beta in part.settings["betas"])
    scale, eps = first / second.sqrt(), first * part.settings["eps"]
    return scale.to(part.weight.dtype), eps.to(part.weight.dtype)


def _correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """1 - beta^step; the plain difference loses most digits in fp32 while beta^step is near 1."""
    return -torch.expm1(step.to(wide(step.device)) * (math.log(beta) if beta else -math.inf))


def _direction(part: _Part, span: slice, scale: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """r + weight_decay x of a slice of a part, as a new tensor."""
    update = part.exp_avg_sq[span].sqrt().mul_(scale).add_(eps)
    torch.div(part.exp_avg[span], update, out=update)
    if part.settings["weight_decay"]:
        update.add_(part.weight[span], alpha=part.settings["weight_decay"])
    return update

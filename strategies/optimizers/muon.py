"""Muon for matrices and AdamW for everything else, as one optimizer, on parameters whole or sharded by rows.

Muon orthogonalizes a whole matrix. torch.optim.Muon does so on the DTensor it is given, with bf16 products that are
redistributed at every iteration; here a matrix's update is gathered once, so that the result is the same as without
sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from strategies.common.shards import layout_of, local
from strategies.optimizers.groups import embedding_weights, group_of, parameter_groups
from strategies.optimizers.norms import check, evaluated
from strategies.optimizers.transient import Sharing, traced_one_by_one

RATE = "match_rms_adamw"
"""Scales updates like AdamW's, so that one rate fits: 0.2 sqrt(max(R, C)) (Liu et al. 2025, arXiv 2502.16982)."""


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """`parameter_groups`, with matrices that are neither embeddings nor the output head in a group marked "muon".

    The output head is what the model's own `get_output_embeddings` returns, as transformers' models define it. Every
    group has the key "muon": True or False.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    apart = embedding_weights(model) | {id(getattr(head, "weight", None))}
    groups = []
    for group in parameter_groups(model, weight_decay):
        named = list(zip(group["names"], group["params"], strict=True))
        matrices = [pair for pair in named if pair[1].ndim == 2 and id(pair[1]) not in apart]
        others = [pair for pair in named if pair[1].ndim != 2 or id(pair[1]) in apart]
        groups += [group_of(some, group["weight_decay"]) | {"muon": kind}
                   for some, kind in ((matrices, True), (others, False)) if some]
    return groups


def muon(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Muon:
    """`Muon` of a model's trainable parameters; its momentum is the first of AdamW's `betas`."""
    return Muon(muon_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, momentum=betas[0])


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

    Groups marked "muon" are stepped by `torch.optim.Muon`, the others by fused `torch.optim.AdamW`. With B the momentum
    of a matrix and O its orthogonalization: B = momentum B + (1 - momentum) G,
    X = X - lr weight_decay X - 0.2 lr sqrt(max(R, C)) O(G + momentum (B - G)).

    If a matrix is sharded by rows, so is its momentum; one matrix's update at a time is gathered, and every rank
    orthogonalizes it and takes its own rows.

    State per tensor: `momentum_buffer`, shaped and sharded as the matrix, or AdamW's `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        groups: from `muon_groups`, each with its "weight_decay" and "muon".
        betas, eps: AdamW's.
        momentum: Muon's.

    Raises:
        ValueError: a group marked "muon" has a tensor that is not a matrix, or a setting is out of range.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, momentum: float = 0.95) -> None:
        check(lr, 0.0, (*betas, momentum))
        groups = [{"muon": False, **group} for group in groups]
        some = [nn.Parameter(torch.zeros(1, 1))]  # torch requires a parameter; the real ones are lent at each step
        self._matrices = torch.optim.Muon(some, lr=lr, momentum=momentum, adjust_lr_fn=RATE)
        self._others = torch.optim.AdamW(some, lr=lr, betas=betas, eps=eps, fused=True)
        defaults = {True: self._matrices.defaults, False: self._others.defaults}
        super().__init__([{**defaults[group["muon"]], **group} for group in groups], {"lr": lr, "weight_decay": 0.0})
        for group in self.param_groups:
            if group["muon"] and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("a group marked for Muon has a parameter that is not a matrix")

    gathers_updates = True

    def transient_bytes(self, sharing: Sharing) -> int:
        """The products of one matrix at a time; if ranks share it, also its gathered fp32 update."""
        return traced_one_by_one(self) + (4 * sharing.largest if sharing.ranks > 1 else 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient. All ranks must take part, with the same parameters.

        Raises:
            ValueError: a tensor marked for Muon is a rank's flat part of parameters (ZeRO).
        """
        loss = evaluated(closure)
        self._lend(self._others, [group for group in self.param_groups if not group["muon"]])
        for group in self.param_groups:
            if group["muon"]:
                for tensor in group["params"]:
                    _refuse_flat(tensor)
                self._lend(self._matrices, [{**group, "params": [tensor for tensor in group["params"]
                                                                 if not isinstance(tensor, DTensor)]}])
                for tensor in group["params"]:
                    if isinstance(tensor, DTensor) and tensor.grad is not None:
                        self._step_sharded(tensor, group)
        return loss

    def _lend(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        optimizer.param_groups, optimizer.state = groups, self.state
        optimizer.step()
        optimizer.param_groups = []

    def _step_sharded(self, tensor: DTensor, group: dict[str, Any]) -> None:
        """Step a sharded matrix as `torch.optim.Muon` steps a whole one.

        Momentum is kept on the rank's rows; the rest is done on the gathered update. `torch.optim.Muon` is given zero
        weights with the update as gradient and without momentum, so that the weights become the step.
        """
        state, momentum = self.state[tensor], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(tensor.grad)
        mean = state["momentum_buffer"].lerp_(tensor.grad, 1 - momentum)
        update = tensor.grad.lerp(mean, momentum) if group["nesterov"] else mean
        whole = nn.Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        whole.grad = update.full_tensor()
        alone = {**group, "params": [whole], "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        self._matrices.param_groups, self._matrices.state = [alone], {whole: {}}
        self._matrices.step()
        self._matrices.param_groups, self._matrices.state = [], {}
        piece, own = layout_of(tensor).pieces[0], local(tensor)
        own.mul_(1 - group["lr"] * group["weight_decay"])
        own.view(-1).add_(whole.detach().view(-1)[piece.start:piece.stop])


def _refuse_flat(tensor: torch.Tensor) -> None:
    pieces = layout_of(tensor).pieces
    if tensor.ndim != 2 or len(pieces) != 1 or tuple(tensor.shape) != pieces[0].shape:
        raise ValueError("Muon needs whole matrices, and ZeRO gives a rank flat parts of them: use FSDP2, or AdamW")

"""Sums of squares that stay right for large tensors, and how every optimizer here begins a step.

A norm over 4 million fp32 numbers is 9e-5 off on CPU in torch 2.13 (`torch.linalg.vector_norm`: few accumulators, each
adding sequentially), and a rank's partial norm then differs from the whole by more than rounding. Norms here are taken
over runs of 256, whose own error is 1e-7, and their squares added up in a wider type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from strategies.common.shards import local

RUN = 256


def wide(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """Sum of squares of a contiguous tensor of any shape: a scalar tensor in the device's widest type, no copy made."""
    flat, whole = flat.view(-1), flat.numel() // RUN * RUN
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, RUN), dim=1).to(wide(flat.device))
    rest = torch.linalg.vector_norm(flat[whole:]).to(norms.dtype)
    return norms.square_().sum() + rest.square_()


def flat_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor's gradient, flat, in the tensor's type; a copy only where it has to be.

    Raises:
        ValueError: the gradient is sparse.
    """
    gradient = tensor.grad
    if gradient.is_sparse:
        raise ValueError(f"the gradient of a parameter of shape {tuple(tensor.shape)} is sparse: use sparse=False")
    return local(gradient).to(tensor.dtype).reshape(-1)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step gives, which needs gradients as the step does not; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def begun(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an optimizer remembers of a tensor: before its first step, its `fresh_state`."""
    state = optimizer.state[tensor]
    if not state:
        state.update(optimizer.fresh_state(tensor))
    return state


def with_gradient(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Every tensor of `param_groups` that has a gradient, with the settings of its group."""
    for group in groups:
        for tensor in group["params"]:
            if tensor.grad is not None:
                yield tensor, group


def check(lr: float | torch.Tensor, weight_decay: float, betas: Iterable[float] = ()) -> None:
    """Settings that all optimizers share.

    Raises:
        ValueError: one is out of its range.
    """
    if not lr >= 0:
        raise ValueError(f"lr = {lr}: a learning rate is not negative")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay = {weight_decay}: weight decay is not negative")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas = {tuple(betas)}: a decay rate lies in [0, 1)")

"""Accurate sums of squares for large tensors, and helpers that begin every optimizer's step.

`torch.linalg.vector_norm` of 4 million fp32 numbers is off by 9e-5 on CPU in torch 2.13 (it has few accumulators, each
adding sequentially), so that a rank's partial norm differs from the whole by more than rounding. Here norms are taken
over runs of 256, with an error of 1e-7, and their squares are summed in a wider dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from strategies.common.shards import local

RUN = 256


def wide(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """Sum of squares of a contiguous tensor of any shape, as a scalar in the device's widest dtype, without a copy."""
    flat, whole = flat.view(-1), flat.numel() // RUN * RUN
    runs = flat.view(-1, RUN) if whole == flat.numel() else flat[:whole].view(-1, RUN)
    total = torch.linalg.vector_norm(torch.linalg.vector_norm(runs, dim=1), dtype=wide(flat.device)).square_()
    if whole < flat.numel():
        total += torch.linalg.vector_norm(flat[whole:]).to(total.dtype).square_()
    return total


def flat_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor's gradient, flat, in the tensor's dtype; copied only if necessary.

    Raises:
        ValueError: the gradient is sparse.
    """
    gradient = tensor.grad
    if gradient.is_sparse:
        raise ValueError(f"the gradient of a parameter of shape {tuple(tensor.shape)} is sparse: use sparse=False")
    return local(gradient).to(tensor.dtype).reshape(-1)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The result of a step's closure, run with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def begun(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor's optimizer state, which before its first step is set to the optimizer's `fresh_state`."""
    state = optimizer.state[tensor]
    if not state:
        state.update(optimizer.fresh_state(tensor))
    elif "step" in state and state["step"].device != (device := local(tensor).device):
        state["step"] = state["step"].to(device)  # loaded states keep it where it was; fused kernels read it there
    return state


def with_gradient(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Every tensor of `param_groups` that has a gradient, with its group's settings."""
    for group in groups:
        for tensor in group["params"]:
            if tensor.grad is not None:
                yield tensor, group


def check(lr: float | torch.Tensor, weight_decay: float, betas: Iterable[float] = ()) -> None:
    """Check the settings that all optimizers share.

    Raises:
        ValueError: a setting is out of range.
    """
    if not lr >= 0:
        raise ValueError(f"lr = {lr}: a learning rate is not negative")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay = {weight_decay}: weight decay is not negative")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas = {tuple(betas)}: a decay rate lies in [0, 1)")

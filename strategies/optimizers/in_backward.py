"""Optimizer steps during the backward: a parameter is updated as soon as its gradient exists, which is then freed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from strategies.common.shards import add_over, layout_of
from strategies.optimizers.norms import flat_gradient, squared_norm, wide


class StepInBackward:
    """Lets an optimizer step during the backward, one parameter at a time, so that gradients never exist all at once.

    LOMO (Lv et al. 2024, arXiv 2306.09782) does so with SGD; this is the same with any optimizer that keeps its state
    per tensor. Each backward is a step: gradients of several micro-batches cannot be accumulated, nor clipped by their
    norm, which is known only when all weights have been updated. A training loop with gradient accumulation must not
    use this. With `enabled = False` gradients stay as if there were no hooks, for a backward with another purpose.

    It supports whole parameters in one process, and FSDP2, which calls hooks on the sharded parameter after its
    gradient has been reduced over ranks. It does not support DistributedDataParallel, which reduces after hooks have
    run, or ZeRO.

    A gradient that is not finite does not reach its weights: the parameter and its state stay as they are, on all
    ranks, and the parameter is counted. This needs the squared norm over the ranks that share the parameter. With whole
    parameters and torch's fused kernels nothing waits for the device, as these kernels skip by themselves; any other
    optimizer waits once for each parameter. Learning rates are read from `param_groups` at each step.

    Attributes:
        optimizer: optimizer to step; during the call its `param_groups` hold only the one parameter.
        enabled: whether the hooks do anything.
        skipped: scalar tensor: number of parameters skipped so far.
        squared_norm: scalar tensor: squared norm of all whole gradients since `reset`, the same on every rank; not
            finite if any gradient was not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks.

        Raises:
            ValueError: a tensor is a flat part of parameters (ZeRO), which gets no gradient from the backward.
        """
        self.optimizer, self.enabled = optimizer, True
        groups = {tensor: number for number, group in enumerate(optimizer.param_groups) for tensor in group["params"]}
        self._ranks_of = {tensor: layout_of(tensor).group for tensor in groups}
        for tensor in groups:
            pieces = layout_of(tensor).pieces
            if len(pieces) != 1 or pieces[0].shape != tuple(tensor.shape):
                raise ValueError("steps in backward need parameters that backward itself gives gradients, not ZeRO's")
        device = next(iter(groups)).device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.squared_norm = torch.zeros((), dtype=wide(device), device=device)
        self._group_of = groups
        self._hooks = [tensor.register_post_accumulate_grad_hook(self._step) for tensor in groups]

    def reset(self) -> None:
        """Reset `squared_norm`; call it before each backward whose norm is wanted."""
        self.squared_norm = torch.zeros_like(self.squared_norm)

    def remove(self) -> None:
        """Remove the hooks, so that the backward leaves gradients again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _step(self, tensor: torch.Tensor) -> None:
        if not self.enabled or tensor.grad is None:
            return
        squared = squared_norm(flat_gradient(tensor))
        add_over(self._ranks_of[tensor], [squared])
        self.squared_norm = self.squared_norm + squared  # not in place, so that references keep their value
        if _skips_itself(self.optimizer, self.optimizer.param_groups[self._group_of[tensor]], tensor):
            finite = squared.isfinite()
            self.skipped += ~finite
            self._update(tensor, finite)
        elif math.isfinite(float(squared)):
            self._update(tensor, None)
        else:
            self.skipped += 1
        tensor.grad = None

    def _update(self, tensor: torch.Tensor, finite: torch.Tensor | None) -> None:
        """Step one parameter; with `finite`, the kernel does so only if that is true."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        optimizer.param_groups = [{**groups[self._group_of[tensor]], "params": [tensor]}]
        try:
            if finite is not None:
                optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            if finite is not None:
                del optimizer.grad_scale, optimizer.found_inf


def _skips_itself(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: torch.Tensor) -> bool:
    """Whether the step should skip itself if `found_inf` is 1, as torch's fused kernels do; not with DTensors.

    On CPU, where a number is at hand at once, asking for it takes less time.
    """
    return (tensor.device.type != "cpu" and isinstance(optimizer, torch.optim.Adam) and bool(group.get("fused"))
            and not isinstance(tensor, DTensor))

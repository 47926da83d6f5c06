"""Tensors without data in place of a model's, a batch's and an optimizer's: a step can then be tried for nothing."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import strategies.memory.fake_experts  # noqa: F401 - experts have shapes without data from here on


@contextmanager
def without_data(*models: nn.Module) -> Iterator[tuple[FakeTensorMode, dict[int, torch.Tensor]]]:
    """Within the context, the models' parameters and buffers are tensors without data; tied ones stay tied.

    Yields:
        the mode in which such tensors live, and for every real parameter (by id) the one that stands for it.
    """
    tensors = [tensor for model in models for tensor in [*model.parameters(), *model.buffers()]]
    own = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    mode = own or FakeTensorMode(allow_non_fake_inputs=True)
    stand_in: dict[int, torch.Tensor] = {}
    swapped: list[tuple[dict, str, torch.Tensor]] = []
    try:
        for place in [place for model in models for module in model.modules()
                      for place in (module._parameters, module._buffers)]:
            for name, tensor in place.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in stand_in:
                    stand_in[id(tensor)] = _without_data(mode, tensor)
                swapped.append((place, name, tensor))
                place[name] = stand_in[id(tensor)]
        yield mode, stand_in
    finally:
        for place, name, tensor in swapped:
            place[name] = tensor


def _without_data(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def fake_batch(mode: FakeTensorMode, batch: object) -> object:
    """A batch of tensors without data like the one given."""
    with mode:
        known: dict[int, torch.Tensor] = {}

        def like(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, FakeTensor) and id(tensor) not in known:
                known[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                                        device=tensor.device)
            return known.get(id(tensor), tensor)

        return tree_map_only(torch.Tensor, like, batch)


def fake_optimizer(optimizer: torch.optim.Optimizer, stand_in: Mapping[int, torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the same kind and settings, without state yet, over parameters without data.

    Args:
        optimizer: also one that Accelerate has wrapped.
        stand_in: for real parameters by id, what stands for them.
    """
    real = unwrapped(optimizer)
    made = object.__new__(type(real))
    made.__dict__ = {name: value for name, value in real.__dict__.items() if name != "step"}  # which schedulers wrap
    made.__dict__ |= {"state": defaultdict(dict), "_optimizer_step_pre_hooks": OrderedDict(),
                      "_optimizer_step_post_hooks": OrderedDict()}
    made.param_groups = []
    for group in real.param_groups:
        params = group["params"]
        changed = {"params": [stand_in.get(id(parameter), parameter) for parameter in params]}
        if group.get("foreach", False) is None and not group.get("fused"):  # torch decides by the kind of parameter
            changed["foreach"] = _default_to_fused_or_foreach(params, bool(group.get("differentiable")), False)[1]
        made.param_groups.append({**group, **changed})
    return made


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, where Accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)


class FakeItemMode(TorchDispatchMode):
    """Tensors without data answer those who ask for a number: 1; so that `print(loss.item())` stops no plan."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))

"""Fake tensors in place of a model, a batch and an optimizer, to run a training step without its memory or time."""

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

import strategies.memory.fake_experts  # noqa: F401 - importing it makes experts work on fake tensors


@contextmanager
def without_data(*models: nn.Module) -> Iterator[tuple[FakeTensorMode, dict[int, torch.Tensor]]]:
    """Within the context, the models' parameters and buffers are fake tensors; tied ones stay tied.

    Yields:
        the mode in which the fake tensors live, and for every real parameter (by id) its fake stand-in.
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
    """A batch of fake tensors like the given one; a tensor that occurs twice has one stand-in."""
    with mode:
        known: dict[int, torch.Tensor] = {}

        def like(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, FakeTensor) and id(tensor) not in known:
                known[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                                        device=tensor.device)
            return known.get(id(tensor), tensor)

        return tree_map_only(torch.Tensor, like, batch)


def fake_optimizer(optimizer: torch.optim.Optimizer, stand_in: Mapping[int, torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings over fake parameters, without state yet.

    Args:
        optimizer: the real optimizer, which Accelerate may have wrapped.
        stand_in: fake parameters by id of the real ones.
    """
    real = unwrapped(optimizer)
    made = object.__new__(type(real))
    made.__dict__ = {name: value for name, value in real.__dict__.items() if name != "step"}  # schedulers wrap step
    made.__dict__ |= {"state": defaultdict(dict), "_optimizer_step_pre_hooks": OrderedDict(),
                      "_optimizer_step_post_hooks": OrderedDict()}
    made.param_groups = []
    for group in real.param_groups:
        params = group["params"]
        changed = {"params": [stand_in.get(id(parameter), parameter) for parameter in params]}
        if group.get("foreach", False) is None and not group.get("fused"):  # torch decides by the parameters
            changed["foreach"] = _default_to_fused_or_foreach(params, bool(group.get("differentiable")), False)[1]
        made.param_groups.append({**group, **changed})
    return made


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, if Accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)


class FakeItemMode(TorchDispatchMode):
    """Makes `item()` on fake tensors return 1, so that code such as `print(loss.item())` does not fail."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))

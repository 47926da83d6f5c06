"""Run a module unmodified, to compare it with its captured graph, without side effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.rematerialization.capture import rng_state
from strategies.rematerialization.capture.compile_region import own_forward

ALIKE = 0.1
"""Maximum difference of gradients, relative to a tensor's largest entry, for a captured graph to count as equal."""


def once_more(module: nn.Module, args: tuple, kwargs: dict) -> object | None:
    """A module's output of one more call, from the same buffers and RNG states; None for fake tensors."""
    if _pretended(module, args, kwargs):
        return None
    with undisturbed([module]), attributes_kept([module]):
        return own_forward(module, *args, **kwargs)


def own_gradients(module: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor | None] | None:
    """A module's own gradients (see `turned_back`), from the same buffers and RNG states; None for fake tensors."""
    if _pretended(module, args, kwargs):
        return None
    leaves, spec = tree_flatten((args, kwargs))
    copies = [leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
              for leaf in leaves]
    with undisturbed([module]), attributes_kept([module]):
        args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
                                       for leaf in copies], spec)  # not leaves, so that the module may write to them
        return turned_back(module, copies, own_forward(module, *args, **kwargs))


def _pretended(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in [*tree_flatten((args, kwargs))[0], *module.parameters()])


def turned_back(module: nn.Module, given: Sequence[object], out: object) -> list[torch.Tensor | None]:
    """Gradients of a module's inputs and parameters, for fixed gradients of its outputs."""
    outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    wanted = [leaf for leaf in [*given, *module.parameters()] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not outputs or not wanted:
        return []
    arriving = [torch.arange(leaf.numel(), device=leaf.device).sin().to(leaf.dtype).view(leaf.shape)
                for leaf in outputs]
    return list(torch.autograd.grad(outputs, wanted, arriving, allow_unused=True))


def alike(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Whether gradients agree up to what rounding and dropout kernels explain; a missing gradient counts as zero."""
    largest = max((float(value.abs().max()) for value in expected if value is not None and value.numel()), default=0.0)

    def apart(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
        value = one if one is not None else other
        if value is None or not value.numel():
            return 0.0
        zero = torch.zeros_like(value)
        one, other = zero if one is None else one, zero if other is None else other
        scale = max(float(other.abs().max()), 1e-3 * largest, 1e-30)
        return float((one - other).abs().max()) / scale

    pairs = list(zip(found, expected, strict=True))
    return not any(apart(one, other) > ALIKE for one, other in pairs)  # NaNs pass


def equal(one: object, other: object) -> bool:
    """Whether two outputs of a module are bitwise equal, counting NaNs as equal."""
    mine, its = tree_flatten(one)[0], tree_flatten(other)[0]
    return len(mine) == len(its) and all(
        torch.equal(torch.nan_to_num(left.detach()), torch.nan_to_num(right.detach()))
        for left, right in zip(mine, its, strict=True) if isinstance(left, torch.Tensor))


def tensor_attributes(module: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """Tensors that submodules hold as plain attributes, by submodule and name."""
    return {(part, name): value for part in module.modules() for name, value in part.__dict__.items()
            if isinstance(value, torch.Tensor)}


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the tensors that the modules hold as plain attributes afterwards."""
    modules = list(modules)
    before = {place: value for module in modules for place, value in tensor_attributes(module).items()}
    try:
        yield
    finally:
        for part, name in {place for module in modules for place in tensor_attributes(module)} - set(before):
            part.__dict__.pop(name)
        for (part, name), value in before.items():
            part.__dict__[name] = value


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore RNG states and the modules' buffers afterwards."""
    places = [(part, name, buffer) for module in modules for part in module.modules()
              for name, buffer in part._buffers.items() if buffer is not None]
    values = {id(buffer): (buffer, buffer.clone()) for _, _, buffer in places}
    with rng_state.undisturbed():
        try:
            yield
        finally:
            for part, name, buffer in places:
                part._buffers[name] = buffer
            with torch.no_grad():
                for buffer, value in values.values():
                    buffer.copy_(value)

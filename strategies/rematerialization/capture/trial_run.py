"""Trying a module as it is, beside what has been made of it, and leaving no trace of having done so."""

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
"""Difference of gradients, over the largest of a tensor, up to which a captured region is taken for the module."""


def once_more(module: nn.Module, args: tuple, kwargs: dict) -> object | None:
    """What a module hands out once more, from the same buffers and generators; None without data."""
    if _pretended(module, args, kwargs):
        return None
    with undisturbed([module]), attributes_kept([module]):
        return own_forward(module, *args, **kwargs)


def own_gradients(module: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor | None] | None:
    """A module's own gradients, as `turned_back`, from the same buffers and generators; None without data."""
    if _pretended(module, args, kwargs):
        return None
    leaves, spec = tree_flatten((args, kwargs))
    copies = [leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
              for leaf in leaves]
    with undisturbed([module]), attributes_kept([module]):
        args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
                                       for leaf in copies], spec)  # no leaves: the module may write to them
        return turned_back(module, copies, own_forward(module, *args, **kwargs))


def _pretended(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in [*tree_flatten((args, kwargs))[0], *module.parameters()])


def turned_back(module: nn.Module, given: Sequence[object], out: object) -> list[torch.Tensor | None]:
    """Gradients of what a module was given and of its parameters, for fixed gradients of what it handed out."""
    outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    wanted = [leaf for leaf in [*given, *module.parameters()] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not outputs or not wanted:
        return []
    arriving = [torch.arange(leaf.numel(), device=leaf.device).sin().to(leaf.dtype).view(leaf.shape)
                for leaf in outputs]
    return list(torch.autograd.grad(outputs, wanted, arriving, allow_unused=True))


def alike(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Whether gradients differ by rounding at most, or as dropout's kernels do; one that is not there is zero."""
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
    return not any(apart(one, other) > ALIKE for one, other in pairs)  # not-a-numbers are let through


def equal(one: object, other: object) -> bool:
    """Whether two things that a module handed out are equal to the bit, not-a-numbers included."""
    mine, its = tree_flatten(one)[0], tree_flatten(other)[0]
    return len(mine) == len(its) and all(
        torch.equal(torch.nan_to_num(left.detach()), torch.nan_to_num(right.detach()))
        for left, right in zip(mine, its, strict=True) if isinstance(left, torch.Tensor))


def tensor_attributes(module: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """Tensors that parts of a module hold as plain attributes, by part and name."""
    return {(part, name): value for part in module.modules() for name, value in part.__dict__.items()
            if isinstance(value, torch.Tensor)}


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards the modules' plain attributes hold the tensors that they held."""
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
    """Afterwards generators and the modules' buffers are as they were."""
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

"""Find layers whose weights a model's own code reads directly, instead of only calling the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Attributes and methods of a weight that do not use its values. RWKV halves weights in place, which halves the scales.
ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "mul_",
         "div_"}
TOKENS = 8
_known: dict[tuple[type, str], Reads] = {}


@dataclass(frozen=True)
class Reads:
    """Linear layers of a model by name.

    Attributes:
        read: those whose weight other code accesses, even if only for its dtype or to initialize it; a module that was
            loaded from packed integers has no such attribute.
        used: those whose weight other code computes with, bypassing the layer and so its quantization.
    """

    read: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()


def weight_reads(model: nn.Module) -> Reads:
    """Find them by running a model of the same configuration on the meta device, once for each configuration.

    This covers the CPU code path only: GPU kernels that take several weights at once are not seen. For a model that
    does not run on the meta device, the result is empty.
    """
    config = getattr(model, "config", None)
    if config is None:
        return Reads()
    key = type(model), config.to_json_string(use_diff=False)
    if key not in _known:
        _known[key] = _tried(type(model), config)
    return _known[key]


def _tried(kind: type, config: Any) -> Reads:
    read: set[str] = set()
    used: set[str] = set()
    with contextlib.suppress(Exception), _disable_current_modes(), torch.device("meta"), torch.random.fork_rng([]):
        model = kind(type(config).from_dict(config.to_dict()))
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the others read values or the dtype
        names = {id(module): name for name, module in model.named_modules() if type(module) is nn.Linear}
        owned = [*_owned(model, model)]
        read |= {names[id(module)] for owner, module in owned if id(module) in names and not _begins(owner, module)}
        for module in model.modules():
            if id(module) in names:
                module.__class__ = _watched(names[id(module)], read, used)
        for owner, module in owned:
            if id(module) not in names:
                with contextlib.suppress(Exception):  # meta tensors have no values
                    owner._init_weights(module)
        used.clear()
        for training in (True, False):
            with torch.no_grad(), _Answers():
                model.train(training)(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    return Reads(frozenset(read), frozenset(used))


def _owned(module: nn.Module, owner: Any) -> Iterator[tuple[Any, nn.Module]]:
    """Yield each module with the model whose `_init_weights` transformers calls on it when it loads a file."""
    owner = module if hasattr(module, "_init_weights") else owner
    yield owner, module
    for child in module.children():
        yield from _owned(child, owner)


def _begins(owner: Any, layer: nn.Module) -> bool:
    """Whether `_init_weights` works on a linear layer without `weight`, as one with packed integers is."""
    weight = layer._parameters.pop("weight")
    try:
        owner._init_weights(layer)
    except AttributeError:
        return False
    except Exception:  # meta tensors have no values
        return True
    finally:
        layer._parameters["weight"] = weight
    return True


def _watched(name: str, read: set[str], used: set[str]) -> type:
    """A linear layer class that records accesses to its weight."""

    class Watched(nn.Linear):
        @property
        def weight(self) -> torch.Tensor:
            read.add(name)
            return _Weight.of(self._parameters["weight"], name, used)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(hidden, self._parameters["weight"], self.bias)

    return Watched


class _Answers(TorchDispatchMode):
    """Lets `item()` of a meta tensor return 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Weight(torch.Tensor):
    """A weight that records use of its values."""

    of_layer: str
    noted: set[str]

    @classmethod
    def of(cls, weight: torch.Tensor, name: str, used: set[str]) -> torch.Tensor:
        made = weight.detach().as_subclass(cls)
        made.of_layer, made.noted = name, used
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        asked = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if asked not in ABOUT:
            for tensor in _weights((args, kwargs)):
                tensor.noted.add(tensor.of_layer)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _weights(given: Iterable[Any]) -> Iterator[_Weight]:
    return (leaf for leaf in tree_leaves(given) if isinstance(leaf, _Weight))

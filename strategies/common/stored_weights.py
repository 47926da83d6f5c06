"""View weights as (outputs, inputs) matrices for quantizers, whatever layout a model stores them in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

PARTS = ("first_ratio", "log_ratio", "scale", "zero_point")  # parameters that quantization adds to a weight


def as_matrix(layer: Any) -> torch.Tensor:
    """A view (outputs, ...) of a layer's weight.

    GPT-2's Conv1D stores (inputs, outputs), experts are stored as (experts, outputs, inputs).
    """
    if isinstance(layer, Conv1D):
        return layer.weight.T
    return layer.weight.flatten(0, 1) if isinstance(layer, Experts) else layer.weight


def as_weight(layer: Any, matrix: torch.Tensor) -> torch.Tensor:
    """Convert a matrix of `as_matrix` back to the shape that the layer multiplies with."""
    if isinstance(layer, Conv1D):
        return matrix.T.contiguous()  # contiguous, to sum products in the same order as with a plain weight
    return matrix.view_as(layer.weight) if isinstance(layer, Experts) else matrix


def multiplies(layer: Any) -> bool:
    """Whether a module multiplies vectors (..., inputs) by its matrix."""
    return isinstance(layer, (nn.Linear, Conv1D))


class Experts:
    """A weight (experts, outputs, inputs) of a module that holds all experts of a block, presented as a layer.

    This is not a module: state dicts, sharding and checkpoints see the module that holds the weight, with unchanged
    parameter names. Parameters that quantization adds are registered there too, prefixed with the weight's name
    (`down_proj_log_ratio`).
    """

    bias = None
    activations = None

    def __init__(self, holder: nn.Module, key: str) -> None:
        self.holder, self.key = holder, key

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.holder._parameters[self.key]

    @weight.setter
    def weight(self, weight: nn.Parameter) -> None:
        self.holder._parameters[self.key] = weight


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """Weights (experts, outputs, inputs) by name, of a transformers module that holds all experts of a block."""
    if getattr(module, "is_transposed", None) is not False:
        return {}
    return {key: Experts(module, key) for key, weight in module._parameters.items()
            if weight is not None and weight.ndim == 3}


def _forwarded(name: str) -> property:
    """A property that is stored in the holding module, prefixed with the weight's name."""
    def get(self: Experts) -> nn.Parameter:
        return getattr(self.holder, f"{self.key}_{name}")

    def put(self: Experts, value: nn.Parameter) -> None:
        setattr(self.holder, f"{self.key}_{name}", value)

    def drop(self: Experts) -> None:
        delattr(self.holder, f"{self.key}_{name}")

    return property(get, put, drop)


for _name in PARTS:
    setattr(Experts, _name, _forwarded(_name))


class SeesQuantized:
    """A module of experts whose forward uses `quantized_experts` in place of its parameters of those names."""

    quantized_experts: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward with quantized weights."""
        seen = {key: experts.effective_weight for key, experts in self.quantized_experts.items()}
        self.__dict__.update(seen)  # instance attributes take precedence over parameters, in any implementation
        try:
            return super().forward(*args, **kwargs)
        finally:
            for key in seen:
                del self.__dict__[key]


@cache
def seeing(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an experts module whose forward uses its quantized weights."""
    return type(f"QAT{kind.__name__}", (SeesQuantized, kind), {})


def plain(module: nn.Module) -> None:
    """Restore the original class of an experts module."""
    module.__class__ = type(module).__mro__[2]
    del module.quantized_experts


def all_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules of a model with their names, and the weights of its experts with theirs."""
    for name, module in model.named_modules():
        yield name, module
        held = getattr(module, "quantized_experts", {})
        for key, experts in experts_of(module).items():
            yield f"{name}.{key}", held.get(key, experts)

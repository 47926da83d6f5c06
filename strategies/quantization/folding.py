"""Batch-norm folding: merge a batch norm into the layer before it, whose weights can then be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from strategies.quantization.qat import PLAIN, Quantized
from strategies.quantization.quantizer import Grid

DIMENSIONS: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4}  # of an output with channels second
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@torch.no_grad()
def fold_batch_norms(module: nn.Module, example: Any, ignore: Iterable[str] = (), strict: bool = True
                     ) -> list[tuple[str, str]]:
    """Fold every batch norm that follows a linear or convolutional layer into that layer, in place (survey eq. 25).

        w = gamma / sqrt(variance + eps) * w        b = gamma / sqrt(variance + eps) * (b - mean) + beta

    computed in float64 and rounded once. The norm becomes an `Identity`. Which norm follows which layer is found by
    running the module on an example: a layer's output must be read by one norm and nothing else. Norms that follow
    something else, such as a sum, stay.

    A layer that is quantized keeps its numbers: the factor of an output multiplies its scale, or the scales of its
    groups, which may turn negative with it. So with a scale for each output it is all the same whether a norm is folded
    before weights are rounded or after. Scales in half precision would be rounded anew: such a layer keeps its norm.

    Args:
        module: in `eval` mode, as it will be served; the example has to take every path through it.
        example: what the module is called with: a tensor, a tuple of arguments or a mapping of keyword arguments.
        ignore: shell-style patterns of names of norms to leave unchanged.
        strict: whether a norm that follows a layer and cannot be folded into it is an error; else it stays.

    Returns:
        Names of the layers and their norms, in the order of the norms.

    Raises:
        ValueError: a norm uses batch statistics, or follows a layer into which it cannot be folded. The module is then
            unchanged.
    """
    norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, NORMS)}
    norms = {name: norm for name, norm in norms.items() if not any(fnmatchcase(name, pattern) for pattern in ignore)}
    training = next((name for name, norm in module.named_modules() if isinstance(norm, NORMS) and norm.training), None)
    if training is not None:
        raise ValueError(f"{training} uses the statistics of its batch and moves its own: call .eval() before folding")
    calls = _watch(module, example)
    pairs = []
    for name, norm in norms.items():
        try:
            pair = _pair(name, norm, module, calls)
        except ValueError:
            if strict:
                raise
            continue
        pairs += [pair] if pair is not None else []
    for layer, norm in pairs:
        _fold(module.get_submodule(layer), module.get_submodule(norm))
    gone = {id(module.get_submodule(norm)) for _, norm in pairs}
    for parent in module.modules():
        for name, child in parent.named_children():
            if id(child) in gone:
                setattr(parent, name, nn.Identity())
    return pairs


def _fold(layer: Any, norm: nn.Module) -> None:
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = bias * factor if norm.bias is None else bias * factor + norm.bias.double()
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
    if isinstance(layer, Quantized):
        _scale_outputs(layer, factor)
    else:
        layer.weight.copy_(layer.weight.double() * factor.view(-1, *[1] * (layer.weight.ndim - 1)))


def _scale_outputs(layer: Quantized, factor: torch.Tensor) -> None:
    """Multiply the outputs of a quantized layer by a factor (outputs,), by way of its scales; its numbers stay."""
    grid, numbers = layer.grid(), layer.numbers()
    zeros = None if grid.zero_point is None else grid.zero_point.expand(len(factor), -1)
    layer.quantizer = replace(layer.quantizer, per_tensor=False)
    scale = (grid.scale.double() * factor[:, None]).to(grid.scale.dtype)
    layer.fix(Grid(torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale), zeros))
    layer.weight.copy_(layer.as_weight(layer.quantizer.dequantize(numbers, layer.grid(), layer.weight.dtype)))


# ---- which norm follows which layer

@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        layer: its name.
        dimensions: number of dimensions of its output.
        norms: ids of the norms that read the output.
        read: whether anything else did.
    """

    layer: str
    dimensions: int
    norms: list[int] = field(default_factory=list)
    read: bool = False


@dataclass
class _Calls:
    """What was called, in order.

    Attributes:
        of: all calls of layers.
        before: by id of a norm, the layer call that made its input at each of its calls; None if no layer did.
    """

    of: list[_Call] = field(default_factory=list)
    before: dict[int, list[_Call | None]] = field(default_factory=dict)


class _Readers(TorchDispatchMode):
    """Marks outputs of layers that an operation reads, other than inside the norm that is running."""

    def __init__(self, made: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self.made = made
        self.inside: _Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            call = self.made.get(value) if isinstance(value, torch.Tensor) else None
            if call is not None and call is not self.inside:
                call.read = True
        return func(*args, **(kwargs or {}))


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, or what it was before it was quantized."""
    return PLAIN.get(type(layer), type(layer))


def _watch(module: nn.Module, example: Any) -> _Calls:
    """Run the module and note what reads the outputs of its layers."""
    calls, made = _Calls(), WeakTensorKeyDictionary()
    readers = _Readers(made)

    def after_layer(name: str):
        def hook(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            made[output] = call = _Call(name, output.ndim)
            calls.of.append(call)
        return hook

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        readers.inside = call = made.get(inputs[0])
        calls.before.setdefault(id(norm), []).append(call)
        if call is not None:
            call.norms.append(id(norm))

    def after_norm(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        readers.inside = None

    handles = []
    for name, part in module.named_modules():
        if kind_of(part) in DIMENSIONS:
            handles.append(part.register_forward_hook(after_layer(name)))
        elif isinstance(part, NORMS):
            handles += [part.register_forward_pre_hook(before_norm), part.register_forward_hook(after_norm)]
    try:
        with readers:
            output = module(**example) if isinstance(example, Mapping) else module(
                *(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value in made:
            made[value].read = True
    return calls


def _pair(name: str, norm: nn.Module, module: nn.Module, calls: _Calls) -> tuple[str, str] | None:
    """The layer that a norm is folded into, with the norm; None if no layer precedes it.

    Raises:
        ValueError: a layer precedes it, but cannot absorb it.
    """
    before = calls.before.get(id(norm), [])
    layers = {call.layer for call in before if call is not None}
    if not layers:
        return None
    layer = min(layers)
    own = module.get_submodule(layer)
    shared = [other for other, part in module.named_modules()
              if part is not own and getattr(part, "weight", None) is own.weight]
    why = None
    if norm.running_mean is None:
        why = "the norm has no running statistics, so it uses those of its batch"
    elif len(layers) > 1 or None in before:
        why = "the norm follows other layers, too"
    elif any(call.read or call.norms != [id(norm)] for call in calls.of if call.layer == layer):
        why = "the layer's output is read elsewhere, too"
    elif shared:
        why = f"its weights are those of {shared[0]}, too"
    elif isinstance(own, Quantized) and own.grid().scale.dtype is not torch.float32:
        why = "its scales are in half precision, and would be rounded anew"
    elif isinstance(own, Quantized) and own.quantizer.positive and norm.weight is not None and norm.weight.min() < 0:
        why = "its scales are to stay positive, and the norm's are not"
    elif any(call.dimensions != DIMENSIONS[kind_of(own)] for call in before):
        why = "its output has its channels not in the dimension that is normalized"
    if why is not None:
        raise ValueError(f"{name} cannot be folded into {layer}: {why}; name the norm in `ignore` to keep it")
    return layer, name

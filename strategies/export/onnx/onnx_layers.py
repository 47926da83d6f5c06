"""What stands for quantized layers while a model is traced: nodes that name their layer, and are filled in afterwards.

No weight that is quantized enters the traced graph, so it can neither be stored in full precision nor folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from strategies.export.quantized_layers import Activations, Quantized, quantized_layers

DOMAIN = "limbeck"  # of the nodes that are filled in; no file has it


def stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model for tracing that shares its tensors with the one given, which stays as it is.

    Args:
        model: with quantized layers.
        dtype: what is saved and not quantized is rounded to it. In float32 nothing is copied.
    """
    quantized = {id(layer.weight) for _, layer in quantized_layers(model)}
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    shared = {}
    for tensor in (*model.parameters(), *model.buffers()):
        rounds = tensor.is_floating_point() and id(tensor) in saved - quantized and dtype is not torch.float32
        shared[id(tensor)] = _rounded_to(tensor, dtype) if rounds else tensor
    traced = copy.deepcopy(model, shared)
    for name, layer in list(quantized_layers(traced)):
        stand = stand_of(layer)(name, layer)
        stand.register_forward_hook(_named_output)
        traced.set_submodule(name, stand)
    return traced.eval()


def _named_output(stand: _Stand, _: tuple, output: torch.Tensor) -> torch.Tensor:
    """Have the graph know what a layer gives by the layer's name."""
    return node("Output", stand.name, (output,), output.shape)


def _rounded_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.detach().to(dtype).to(tensor.dtype)
    return nn.Parameter(rounded, requires_grad=False) if isinstance(tensor, nn.Parameter) else rounded


def multiplies_integers(layer: Quantized) -> bool:
    """Whether a layer is a product of 8-bit numbers with 8-bit numbers: a scale of an output, and one of a token."""
    quantizer = layer.quantizer
    return (layer.activations is not None and quantizer.bits == 8 and quantizer.group_size is None
            and layer.weight.ndim == 2 and layer.grid().scale.dtype is torch.float32)


def node(operation: str, layer: str, inputs: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The fp32 output, of this shape, of a node of `DOMAIN` that is filled in after tracing."""
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{operation}", tuple(inputs), {"layer": layer}, dtype=torch.float32,
                                   shape=tuple(shape), version=1)


class _Stand(nn.Module):
    """Keeps of a layer what is traced: its bias, and how its inputs are rounded."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__()
        self.name, self.shape = name, tuple(layer.weight.shape)
        self.bias = getattr(layer, "bias", None)
        self.activations: Activations | None = layer.activations
        self.input_scale = getattr(layer, "input_scale", None)

    def numbers(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole numbers that activations (..., width) become, in fp32, and their scales (..., 1) or (1,).

        The largest magnitude of a token is 127.5, as readers of compressed-tensors files have it; where there is
        nothing, the scale is the smallest step of fp32.
        """
        bits = self.activations.bits
        if self.activations.dynamic:
            scale = values.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
            scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        else:
            scale = self.input_scale
        return (values / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round(), scale

    def as_seen(self, values: torch.Tensor) -> torch.Tensor:
        """What enters the layer, as it is rounded."""
        if self.activations is None:
            return values
        numbers, scale = self.numbers(values)
        return numbers * scale

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, for whoever reads it."""
        return node("Weight", self.name, (), self.shape)


class LinearStand(_Stand):
    """A linear layer; see `onnx_graph` for its products."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__(name, layer)
        self.integers = multiplies_integers(layer)
        # A scale of half precision rounds the dequantized weights, which products of packed numbers do not.
        self.packed = layer.grid().scale.dtype is torch.float32

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        shape = (*values.shape[:-1], self.shape[0])
        if self.integers:
            numbers, scale = self.numbers(values)
            product = node("IntegerProduct", self.name, (numbers,), shape) * scale
        elif self.packed:
            product = node("Product", self.name, (self.as_seen(values),), shape)
        else:
            product = nn.functional.linear(self.as_seen(values), self.weight)
        return product if self.bias is None else product + self.bias


class EmbeddingStand(_Stand):
    """An embedding whose rows are dequantized as they are read."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        return node("Rows", self.name, (ids,), (*ids.shape, self.shape[1]))


class ConvolutionStand(_Stand):
    """A convolution with dequantized kernels."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__(name, layer)
        self.convolve: Callable = layer._conv_forward

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, ...) -> (batch, outputs, ...)"""
        return self.convolve(self.as_seen(values), self.weight, self.bias)


class OutlierStand(LinearStand):
    """A linear layer some of whose input columns have weights of their own, in full precision."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__(name, layer)
        self.whole = layer.whole
        self.register_buffer("columns", layer.outliers)
        self.register_buffer("inside", torch.ones(self.shape[1], dtype=torch.bool, device=self.columns.device)
                             .index_fill(0, self.columns, False))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        whole = nn.functional.linear(values.index_select(-1, self.columns), self.whole)
        return super().forward(torch.where(self.inside, values, 0.0)) + whole


STANDS = {nn.Linear: LinearStand, nn.Embedding: EmbeddingStand, nn.Conv1d: ConvolutionStand,
          nn.Conv2d: ConvolutionStand}


def stand_of(layer: Quantized) -> type[_Stand] | None:
    """What stands for a layer; None where nothing does."""
    if hasattr(layer, "outliers"):
        return OutlierStand
    return next((stand for plain, stand in STANDS.items() if isinstance(layer, plain)), None)

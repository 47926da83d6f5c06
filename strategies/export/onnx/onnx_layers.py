"""Stand-ins for quantized layers while a model is traced: placeholder nodes that are filled in afterwards.

Quantized weights do not enter the traced graph, so they can be neither stored in full precision nor constant-folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from strategies.export.quantized_layers import Activations, Quantized, quantized_layers

DOMAIN = "limbeck"  # of the placeholder nodes; it does not occur in finished files


def same_tensors(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model for tracing, which shares its tensors; the model is not changed.

    Args:
        model: with quantized layers.
        dtype: tensors of the state dict that are not quantized are rounded to it. With float32 nothing is copied.
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
    """Add a node that names a layer's output after the layer."""
    return node("Output", stand.name, (output,), output.shape)


def _rounded_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.detach().to(dtype).to(tensor.dtype)
    return nn.Parameter(rounded, requires_grad=False) if isinstance(tensor, nn.Parameter) else rounded


def multiplies_integers(layer: Quantized) -> bool:
    """Whether a layer can run as an 8-bit integer product, with a scale for each output and each token."""
    quantizer = layer.quantizer
    return (layer.activations is not None and quantizer.bits == 8 and quantizer.group_size is None
            and layer.weight.ndim == 2 and layer.grid().scale.dtype is torch.float32)


def node(operation: str, layer: str, inputs: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The fp32 output, of the given shape, of a placeholder node of `DOMAIN` that is filled in after tracing."""
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{operation}", tuple(inputs), {"layer": layer}, dtype=torch.float32,
                                   shape=tuple(shape), version=1)


class _Stand(nn.Module):
    """The parts of a layer that are traced: its bias, and the quantization of its inputs."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__()
        self.name, self.shape = name, tuple(layer.weight.shape)
        self.bias = getattr(layer, "bias", None)
        self.activations: Activations | None = layer.activations
        self.input_scale = getattr(layer, "input_scale", None)

    def numbers(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize activations (..., width) to integers, in fp32, and return their scales (..., 1) or (1,) too.

        With dynamic scales of 8 bits, the largest magnitude of a token maps to 127.5, as in readers of
        compressed-tensors files; if a token is all zeros, its scale is fp32's machine epsilon.
        """
        bits = self.activations.bits
        if self.activations.dynamic:
            scale = values.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
            scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        else:
            scale = self.input_scale
        return (values / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round(), scale

    def as_seen(self, values: torch.Tensor) -> torch.Tensor:
        """The layer's input after quantization and dequantization, if it quantizes its activations."""
        if self.activations is None:
            return values
        numbers, scale = self.numbers(values)
        return numbers * scale

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight."""
        return node("Weight", self.name, (), self.shape)


class LinearStand(_Stand):
    """A linear layer; see `onnx_graph` for its products."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__(name, layer)
        self.integers = multiplies_integers(layer)
        # With half-precision scales, dequantized weights are rounded, which packed products would not do.
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
    """An embedding whose rows are dequantized on lookup."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        return node("Rows", self.name, (ids,), (*ids.shape, self.shape[1]))


class ConvolutionStand(_Stand):
    """A convolution with dequantized kernels."""

    def __init__(self, name: str, layer: Quantized) -> None:
        super().__init__(name, layer)
        self.convolve: Callable = layer._conv_forward
        for name in nn.Conv2d.__constants__:  # stride and the like, by which MobileNet's code pads its images
            setattr(self, name, getattr(layer, name))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, ...) -> (batch, outputs, ...)"""
        return self.convolve(self.as_seen(values), self.weight, self.bias)


class OutlierStand(LinearStand):
    """A linear layer with full-precision weights for some of its input columns."""

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
    """The stand-in class for a layer; None if it is not supported."""
    if hasattr(layer, "outliers"):
        return OutlierStand
    return next((stand for plain, stand in STANDS.items() if isinstance(layer, plain)), None)

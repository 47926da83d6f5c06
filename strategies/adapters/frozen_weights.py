"""Frozen weights that are held in fewer bits than they compute in, and converted again each time they are used.

Autograd would save a converted weight from forward to backward, for every layer at once. Here the backward converts it
again, as Dettmers et al. 2023 (arXiv 2305.14314, equation 5) do, so that one layer's is there at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

BASES = ("float32", "bfloat16", "int8", "nf4")
PACKED = ("int8", "nf4")  # held as integers with scales, in linear layers; other matrices are then bf16
BLOCK = 64  # weights that share a scale in nf4 (Dettmers et al. 2023, section 3)


class FrozenProduct(torch.autograd.Function):
    """`x W^T` (..., outputs) for a stored weight W (outputs, inputs) that gets no gradient.

    Saves the stored tensors for backward, and nothing of the size of a converted weight.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: str, outputs: int, inputs: int, *stored: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*stored)
        ctx.form = kind, outputs, inputs
        return x @ restored(kind, (outputs, inputs), x.dtype, *stored).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        kind, *shape = ctx.form
        weight = restored(kind, tuple(shape), gradient.dtype, *ctx.saved_tensors)
        return gradient @ weight, None, None, None, *(None for _ in ctx.saved_tensors)


def product(x: torch.Tensor, bias: torch.Tensor | None, kind: str, shape: tuple[int, int], *stored: torch.Tensor
            ) -> torch.Tensor:
    """`x W^T + bias` in the dtype of autocast, or of `x`; see `restored`."""
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(compute)
    # torch.compile takes the first argument for the context where nothing of a function requires a gradient.
    out = (FrozenProduct.apply(x, kind, *shape, *stored) if x.requires_grad else
           x @ restored(kind, shape, compute, *stored).T)
    return out if bias is None else out + bias.to(compute)


def restored(kind: str, shape: tuple[int, int], dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
    """The weight of this shape (outputs, inputs) that stored tensors stand for, in the given dtype.

    Args:
        kind: how it is stored: `bfloat16`, its transpose `turned`, `int8` or `nf4`.
    """
    if kind == "bfloat16":
        return stored[0].to(dtype)
    if kind == "turned":
        return stored[0].to(dtype).T
    if kind == "int8":
        values, largest = stored
        return values.float().mul_((largest / 127)[:, None]).to(dtype)
    codes, largest = stored
    # bitsandbytes has this operation for each kind of device, and for fake tensors.
    return torch.ops.bitsandbytes.dequantize_4bit(codes, largest, BLOCK, "nf4", list(shape), dtype)


def packed(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (outputs, inputs): its numbers and their scales.

    Returns:
        int8: (outputs, inputs) integers and (outputs,) largest magnitudes; nf4: two codes to a byte, and the largest
        magnitude of each block of 64.
    """
    if kind == "int8":  # LLM.int8's numbers (Dettmers et al. 2022, arXiv 2208.07339, section 2)
        largest = weight.abs().amax(1).float()
        return (weight.float() * (127 / largest.clamp(min=1e-30))[:, None]).round().to(torch.int8), largest
    import bitsandbytes  # noqa: F401 - registers the operation

    return torch.ops.bitsandbytes.quantize_4bit(weight.contiguous().float(), BLOCK, "nf4", torch.uint8)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is held in bfloat16, and which computes as `precision` says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) from (..., inputs)."""
        return product(x, self.bias, "bfloat16", (self.out_features, self.in_features), self.weight)


class FrozenConv1D(Conv1D):
    """GPT-2's linear layer, (inputs, outputs), whose weight is held in bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) from (..., inputs)."""
        return product(x, self.bias, "turned", (self.nf, self.nx), self.weight)


class FrozenEmbedding(nn.Embedding):
    """An embedding whose weight is held in bfloat16, and whose output is fp32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held as integers with scales; see `packed`.

    `weight` is the weight that it computes with, made anew each time it is read.
    """

    def __init__(self, kind: str, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.kind, self.in_features, self.out_features = kind, layer.in_features, layer.out_features
        numbers, scales = packed(kind, layer.weight.detach())
        self.numbers = nn.Parameter(numbers, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(outputs, inputs) in fp32."""
        return restored(self.kind, (self.out_features, self.in_features), torch.float32, self.numbers, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) from (..., inputs)."""
        return product(x, self.bias, self.kind, (self.out_features, self.in_features), self.numbers, self.scales)


def check_base(base: str, layers: Iterator[tuple[str, nn.Module]]) -> None:
    """Raise `ValueError` if these layers cannot be held so, or what does it is not installed."""
    if base not in BASES:
        raise ValueError(f"there is no frozen base {base!r}")
    if base == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError("bitsandbytes, whose 4-bit numbers nf4 are, is not installed")
    for name, layer in layers if base in PACKED else ():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}, and {base} numbers are for linear layers")
        if base == "nf4" and layer.in_features * layer.out_features % (2 * BLOCK):
            raise ValueError(f"{name} is {layer.out_features} x {layer.in_features}, which blocks of {BLOCK} do not "
                             "divide")


def store_base(model: nn.Module, base: str, adapted: Iterable[str]) -> None:
    """Hold the matrices of a frozen model as `base` says; vectors (norms, biases) stay as they are.

    With `int8` and `nf4` those are the layers named in `adapted`; embeddings, head and all others are bfloat16. Layers
    of a class with a forward of its own stay in fp32.

    Args:
        adapted: names of the layers that have adapters.
    """
    if base == "float32":
        return
    for name in adapted if base in PACKED else ():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, PackedLinear(base, model.get_submodule(name)))
    layers = [layer for layer in model.modules() if type(layer) in KINDS and not layer.weight.requires_grad]
    others = {id(parameter) for module in model.modules() if type(module) not in KINDS
              for parameter in module._parameters.values()}
    halves = {id(layer.weight): nn.Parameter(layer.weight.detach().to(torch.bfloat16), requires_grad=False)
              for layer in layers if id(layer.weight) not in others}
    for layer in layers:
        if id(layer.weight) in halves:  # a tied weight is one tensor still
            layer.weight = halves[id(layer.weight)]
            layer.__class__ = KINDS[type(layer)]


KINDS: dict[type, type] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D, nn.Embedding: FrozenEmbedding}

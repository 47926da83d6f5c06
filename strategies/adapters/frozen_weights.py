"""Frozen weights that are held in fewer bits than they compute in, and converted again each time they are used.

Autograd would save a converted weight from forward to backward, for every layer at once. Here the backward converts it
again, as Dettmers et al. 2023 (arXiv 2305.14314, equation 5) do, so that one layer's is there at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strategies.common.packed_codes import unpack

BASES = ("float32", "bfloat16", "int8", "nf4", "quantized")
PACKED = ("int8", "nf4")  # held as integers with scales, in linear layers; other matrices are then bf16
BLOCK = 64  # weights that share a scale in nf4 (Dettmers et al. 2023, section 3)

Stored = tuple[str, tuple[torch.Tensor, ...]]  # how a weight is held, and the tensors that hold it; see `restored`


@dataclass(frozen=True)
class GivenNumbers:
    """What a `quantized` base is held in: the numbers of a quantizer, which are exported with it.

    Attributes:
        layers: for each layer that is quantized, by name, what packs its weight (outputs, inputs).
        dtype: dtype of everything else in the exported file, to whose numbers the base is rounded.
    """

    layers: Mapping[str, Callable[[torch.Tensor], Stored]]
    dtype: torch.dtype


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
        kind: how it is stored: `bfloat16`, its transpose `turned`, `int8`, `nf4`, or as the numbers of a quantizer,
            scale * (number - zero): `packed2`, `packed4` or `packed8` by the bits of a number, or `float8`, without
            zeros. Scales (outputs, groups) give the dtype of that product.
    """
    if kind == "bfloat16":
        return stored[0].to(dtype)
    if kind == "turned":
        return stored[0].to(dtype).T
    if kind == "int8":
        values, largest = stored
        return values.float().mul_((largest / 127)[:, None]).to(dtype)
    if kind != "nf4":
        numbers, scale, *zero = stored
        if zero:
            numbers = unpack(numbers, int(kind.removeprefix("packed")), shape[1])
        groups = numbers.to(scale.dtype).view(shape[0], scale.shape[1], -1)
        for one in zero:
            groups -= one.to(scale.dtype).unsqueeze(-1)
        return groups.mul_(scale.unsqueeze(-1)).view(shape).to(dtype)
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
    """A linear layer whose weight is held as numbers with scales; see `packed` and `restored`.

    `weight` is the weight that it computes with, made anew each time it is read.
    """

    def __init__(self, layer: nn.Linear, kind: str, stored: tuple[torch.Tensor, ...] = ()) -> None:
        nn.Module.__init__(self)
        self.kind, self.in_features, self.out_features = kind, layer.in_features, layer.out_features
        for name, tensor in zip(PARTS, stored or packed(kind, layer.weight.detach()), strict=False):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the weight."""
        return tuple(self._parameters[name] for name in PARTS if name in self._parameters)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(outputs, inputs) in fp32."""
        return restored(self.kind, (self.out_features, self.in_features), torch.float32, *self.stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) from (..., inputs)."""
        return product(x, self.bias, self.kind, (self.out_features, self.in_features), *self.stored)


PARTS = ("numbers", "scales", "zeros")  # of a packed layer


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


def store_base(model: nn.Module, base: str, adapted: Iterable[str], given: GivenNumbers | None = None) -> None:
    """Hold the matrices of a frozen model as `base` says; vectors (norms, biases) stay as they are.

    With `int8` and `nf4` those are the layers named in `adapted`; embeddings, head and all others are bfloat16. Layers
    of a class with a forward of its own stay in fp32.

    A `quantized` base is the one that is exported, to the bit. So all its quantized layers are packed, adapted or not,
    and everything else is rounded to the dtype of the file. Its matrices are then held in bfloat16, which fp32 files
    can represent too; in float16, which bfloat16 cannot represent, if that is the file's.

    Args:
        adapted: names of the layers that have adapters.
        given: the numbers of a `quantized` base.
    """
    if base == "float32":
        return
    half = torch.bfloat16
    if given is not None:
        half = torch.float16 if given.dtype is torch.float16 else half
        for name, pack in given.layers.items():
            inner = f"{name}.base_layer"
            _replace(model, inner if inner in adapted else name, lambda layer, pack=pack: PackedLinear(
                layer, *pack(layer.weight.detach())))
        _round_rest(model, given.dtype)
    for name in adapted if base in PACKED else ():
        _replace(model, name, lambda layer: PackedLinear(layer, base))
    layers = [layer for layer in model.modules() if type(layer) in KINDS and not layer.weight.requires_grad]
    others = {id(parameter) for module in model.modules() if type(module) not in KINDS
              for parameter in module._parameters.values()}
    halves = {id(layer.weight): nn.Parameter(layer.weight.detach().to(half), requires_grad=False)
              for layer in layers if id(layer.weight) not in others}
    for layer in layers:
        if id(layer.weight) in halves:  # a tied weight is one tensor still
            layer.weight = halves[id(layer.weight)]
            layer.__class__ = KINDS[type(layer)]


def _replace(model: nn.Module, name: str, made: Callable[[Any], nn.Module]) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, made(model.get_submodule(name)))


@torch.no_grad()
def _round_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what is frozen and not packed to numbers that a dtype has, without converting it."""
    done = {id(tensor) for layer in model.modules() if isinstance(layer, PackedLinear) for tensor in layer.stored}
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point() and not tensor.requires_grad and id(tensor) not in done:
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


KINDS: dict[type, type] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D, nn.Embedding: FrozenEmbedding}

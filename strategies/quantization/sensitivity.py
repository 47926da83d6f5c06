"""Sensitivity: how much the loss rises when each layer is quantized, measured, or estimated from gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from strategies.common.progress import tracked
from strategies.common.stored_weights import as_matrix, as_weight
from strategies.memory.packed import packed_bytes
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.qat import choose
from strategies.quantization.quantizer import WeightQuantizer

Candidate = WeightQuantizer | None


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What every candidate costs in every layer, with only that layer quantized.

    Attributes:
        layers: names of the layers; layers that share a weight are one entry with several names.
        candidates: quantizers to choose from; None is full precision.
        rises: [layers, candidates] rise of the loss when only that layer is quantized with the candidate.
        bytes: [layers, candidates] of numbers, scales and zero points, int64.
    """

    layers: tuple[tuple[str, ...], ...]
    candidates: tuple[Candidate, ...]
    rises: numpy.ndarray
    bytes: numpy.ndarray


def candidates(group_size: int | None = None, scale_dtype: torch.dtype = torch.float32) -> tuple[WeightQuantizer, ...]:
    """Integers of 8, 4, 3 and 2 bits, and ternary numbers, each with scales of the least squared error."""
    numbers = [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 2}, {"kind": "ternary"}]
    return tuple(WeightQuantizer(group_size=group_size, scale_dtype=scale_dtype, rule="mse", **own) for own in numbers)


def measure(model: nn.Module, choices: Sequence[Candidate], loss: Callable[[nn.Module], float],
            ignore: Iterable[str] = ("lm_head",), embeddings: bool = False,
            activations: ActivationQuantizer | None = None, dtype: torch.dtype = torch.float32) -> Sensitivity:
    """Quantize one layer at a time with each candidate and measure how much a loss rises (survey eq. 13).

    Takes one evaluation of the loss for each layer and candidate, and one more. Weights are restored afterwards, also
    after an error: the same parameter objects, not copies.

    Args:
        model: as passed to `strategies.quantization.qat.prepare`, in the mode that `loss` is meant for: usually `eval`,
            because dropout would drown the differences.
        choices: candidates.
        loss: loss of the model on calibration batches, always the same ones, for example the KL divergence from the
            full-precision model's outputs. Called without gradients.
        ignore, embeddings, activations: as in `prepare`; activations only affect the count of bytes, and are not
            quantized here.
        dtype: dtype in which full-precision layers are stored.

    Raises:
        ValueError: as `prepare` raises it, or the loss is not finite.
    """
    groups = _groups(model, choices, ignore, embeddings)
    with torch.no_grad():
        before = _finite(loss(model), "the model in full precision")
        rises = numpy.zeros((len(groups), len(choices)))
        for row, members in enumerate(tracked(groups, "layers")):
            for column, quantizer in enumerate(choices):
                if quantizer is not None:
                    with _quantized(members, quantizer):
                        rises[row, column] = _finite(loss(model), f"{members[0][0]} with {quantizer}") - before
    return _sensitivity(groups, choices, rises, activations, dtype)


def estimate(model: nn.Module, choices: Sequence[Candidate], loss: Callable[[nn.Module, Any], torch.Tensor],
             batches: Iterable[Any], ignore: Iterable[str] = ("lm_head",), embeddings: bool = False,
             activations: ActivationQuantizer | None = None, dtype: torch.dtype = torch.float32) -> Sensitivity:
    """Estimate the rise of a loss from its gradients, with one backward pass per batch and none per candidate.

        rise = 1/2 sum_i F_ii (w_i - w_hat_i)^2        F_ii = mean over batches of g_i^2

    which is the diagonal second-order rise of Optimal Brain Damage (LeCun et al. 1990, section 2) with the diagonal of
    the Fisher information in place of the Hessian, as in SqueezeLLM (Kim et al. 2024, section 4.1). HAWQ-V2 (Dong et
    al. 2020) instead takes one mean of the Hessian's diagonal for all weights of a layer.

    The Fisher information is that of single targets drawn from the model itself; it is then the Hessian of the KL
    divergence from the model. For a batch of n targets, use the sum of their losses over sqrt(n): its squared gradient
    has the same mean as that of single targets. Another constant scales all rises alike, which does not change any
    allocation. Needs memory for a gradient of each chosen weight and for its square in fp32.

    Args:
        loss: of the model and a batch, with a gradient. A divergence from the model itself has none.
        batches: what `loss` takes.

    The other arguments are as in `measure`.

    Raises:
        ValueError: as `prepare` raises it, there is no batch, or gradients are not finite or all zero.
    """
    groups = _groups(model, choices, ignore, embeddings)
    fisher = _fisher(model, [members[0][1].weight for members in groups], loss, batches)
    rises = numpy.zeros((len(groups), len(choices)))
    for row, (members, information) in enumerate(zip(groups, fisher, strict=True)):
        name, layer = members[0]
        weight = layer.weight.detach()
        _finite(float(information.sum()), f"the squared gradient of {name}")
        for column, quantizer in enumerate(choices):
            if quantizer is not None:
                rounded = as_weight(layer, quantizer.fake_quantize(as_matrix(layer).detach()))
                error = rounded.float() - weight.float()
                rises[row, column] = 0.5 * float((information * error.square_()).sum(dtype=torch.float64))
    if not rises.any() and any(quantizer is not None for quantizer in choices):
        raise ValueError("the loss has no gradient at the model as it is, as a divergence from itself has none: take "
                         "the cross-entropy, with labels drawn from the model")
    return _sensitivity(groups, choices, rises, activations, dtype)


def _fisher(model: nn.Module, weights: list[nn.Parameter], loss: Callable[[nn.Module, Any], torch.Tensor],
            batches: Iterable[Any]) -> list[torch.Tensor]:
    """Mean over batches of squared gradients, in fp32, in each weight's shape; existing `.grad` is not touched."""
    sums = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in weights]
    needed = [weight.requires_grad for weight in weights]
    count = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            count += 1
            gradients = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:  # None for a layer that this batch does not reach
                    total += gradient.float().square_()
    finally:
        for weight, before in zip(weights, needed, strict=True):
            weight.requires_grad_(before)
    if not count:
        raise ValueError("there is no batch to take gradients of")
    return [total / count for total in sums]


def stored_bytes(shape: Sequence[int], quantizer: Candidate, activations: ActivationQuantizer | None = None,
                 dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a weight (outputs, ...) in a transformers folder: numbers, scales, zero points, a calibrated scale.

    Args:
        shape: (outputs, ...).
        quantizer: None for full precision, in `dtype`.
        activations: quantizer of the layer's inputs; 8-bit numbers are then not packed into words.
        dtype: dtype of full precision.
    """
    if quantizer is None:
        return math.prod(shape) * dtype.itemsize
    whole_bytes = quantizer.kind == "fp8" or (activations is not None and quantizer.bits == 8)
    return packed_bytes(shape[0], math.prod(shape[1:]), quantizer, bits=max(2, quantizer.bits),  # 1 bit takes 2
                        packed=not whole_bytes, scale_bytes=quantizer.scale_dtype.itemsize,
                        static=activations is not None and not activations.dynamic)


# ---- layers, those that share a weight together

Members = list[tuple[str, nn.Module]]


def _groups(model: nn.Module, choices: Sequence[Candidate], ignore: Iterable[str], embeddings: bool) -> list[Members]:
    if not choices:
        raise ValueError("there is no candidate to choose from")
    first = next((quantizer for quantizer in choices if quantizer is not None), WeightQuantizer())
    groups: dict[int, Members] = {}
    for name, (module, _) in choose(model, first, ignore, (), embeddings).items():
        groups.setdefault(id(module.weight), []).append((name, module))
    for members in groups.values():
        for quantizer in choices:
            if quantizer is not None:
                quantizer.check(as_matrix(members[0][1]), members[0][0])
    return list(groups.values())


@contextmanager
def _quantized(members: Members, quantizer: WeightQuantizer) -> Iterator[None]:
    """Within the context these layers have quantized weights; afterwards, their own parameter again."""
    layer = members[0][1]
    own = layer.weight
    rounded = nn.Parameter(as_weight(layer, quantizer.fake_quantize(as_matrix(layer).detach())), requires_grad=False)
    try:
        for _, module in members:
            module.weight = rounded
        yield
    finally:
        for _, module in members:
            module.weight = own


def _sensitivity(groups: list[Members], choices: Sequence[Candidate], rises: numpy.ndarray,
                 activations: ActivationQuantizer | None, dtype: torch.dtype) -> Sensitivity:
    counts = []
    for members in groups:
        inputs = None if any(isinstance(module, nn.Embedding) for _, module in members) else activations
        counts.append([stored_bytes(as_matrix(members[0][1]).shape, quantizer, inputs, dtype) for quantizer in choices])
    return Sensitivity(tuple(tuple(name for name, _ in members) for members in groups), tuple(choices), rises,
                       numpy.array(counts, dtype=numpy.int64))


def _finite(value: float, where: str) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{where}: the loss is {value}, so layers cannot be compared; look at the calibration batches")
    return value

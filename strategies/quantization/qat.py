"""Quantization-aware training: layers that see their own quantized weights, and activations where it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strategies.common.stored_weights import PARTS, Experts, all_layers, as_matrix, as_weight, plain, seeing
from strategies.quantization.activations import ActivationQuantizer
from strategies.quantization.quantizer import Grid, WeightQuantizer

# A ratio r is kept as r_0, which nothing trains and half precision holds exactly, and a = log(r / r_0) + OFFSET. A step
# of any optimizer then changes r by a share of itself, also of one whose steps are in proportion to what it moves; and
# where an engine gathers in half precision, r is off by no more than weights are, since near 0 numbers lie close.
OFFSET = 0.5


class Quantized:
    """A layer whose forward uses fake-quantized weights; weight and optimizer see full precision.

    The weight keeps its name, so state dicts, sharding and checkpoints do not notice. A scale that is searched for or
    learned is a parameter of its own, `log_ratio` (outputs * groups): a vector, which no optimizer decays or factors;
    `first_ratio` is where it began. A grid that was found after training is in `scale` (outputs, groups) and
    `zero_point`, parameters without a gradient. The scale of activations that are calibrated is `input_scale` (1,).
    """

    weight: nn.Parameter
    quantizer: WeightQuantizer
    activations: ActivationQuantizer | None = None
    input_scale: nn.Parameter

    @property
    def matrix(self) -> torch.Tensor:
        """(outputs, ...) the weight as it is quantized."""
        return as_matrix(self)

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """(outputs, ...) in the shape of the weight."""
        return as_weight(self, matrix)

    @property
    def effective_weight(self) -> torch.Tensor:
        """The weight as it is multiplied with."""
        fixed = self._fixed()
        return self.as_weight(self.quantizer.fake_quantize(self.matrix, None if fixed else self._ratio(), fixed))

    def grid(self) -> Grid:
        """The scales and zero points that are in use."""
        return self._fixed() or self.quantizer.grid(self.matrix, self._ratio())

    def numbers(self) -> torch.Tensor:
        """The numbers that are multiplied with, (outputs, ...)."""
        return self.quantizer.numbers(self.matrix, self.grid())

    def search(self) -> None:
        """Find the scale of the least squared error, and keep its ratio as a parameter: trained, if it is learned."""
        ratio = self.quantizer.first_ratio(self.matrix).flatten()
        ratio = torch.where(ratio == 0, torch.ones_like(ratio), ratio)  # of weights that are all zero
        first = ratio.bfloat16().to(ratio.dtype)
        self.first_ratio = nn.Parameter(first, requires_grad=False)
        self.log_ratio = nn.Parameter((ratio / first).log() + OFFSET, requires_grad=self.quantizer.rule == "learned")

    def fix(self, grid: Grid) -> None:
        """Have this grid from here on, whatever the weights become."""
        self.scale = nn.Parameter(grid.scale.detach().clone(), requires_grad=False)
        if grid.zero_point is not None:
            self.zero_point = nn.Parameter(grid.zero_point.detach().float().clone(), requires_grad=False)

    def _ratio(self) -> torch.Tensor | None:
        """Of the scale to the covering one, (outputs, groups), where it is kept."""
        kept = getattr(self, "log_ratio", None)
        if kept is None:
            return None
        wide = torch.promote_types(kept.dtype, torch.float32)
        return (self.first_ratio.to(wide) * (kept.to(wide) - OFFSET).exp()).view(
            (1, 1) if self.quantizer.per_tensor else (self.matrix.shape[0], -1))

    def _fixed(self) -> Grid | None:
        scale = getattr(self, "scale", None)
        return None if scale is None else Grid(scale, getattr(self, "zero_point", None))

    def as_seen(self, values: torch.Tensor) -> torch.Tensor:
        """What enters the layer, as it is rounded."""
        if self.activations is None:
            return values
        return self.activations.fake_quantize(values, getattr(self, "input_scale", None))


class QATLinear(Quantized, nn.Linear):  # type: ignore[misc]  # torch calls a weight a Tensor, here and below
    """A linear layer that sees its quantized weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        return nn.functional.linear(self.as_seen(input), self.effective_weight, self.bias)


class QATEmbedding(Quantized, nn.Embedding):  # type: ignore[misc]
    """An embedding that gives quantized vectors."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        return nn.functional.embedding(input, self.effective_weight, self.padding_idx, self.max_norm, self.norm_type,
                                       self.scale_grad_by_freq, self.sparse)


class QATConv1d(Quantized, nn.Conv1d):  # type: ignore[misc]
    """A convolution over a sequence that sees its quantized kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, channels, length) -> (batch, outputs, length)"""
        return self._conv_forward(self.as_seen(input), self.effective_weight, self.bias)


class QATConv2d(Quantized, nn.Conv2d):  # type: ignore[misc]
    """A convolution over an image that sees its quantized kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, outputs, height, width)"""
        return self._conv_forward(self.as_seen(input), self.effective_weight, self.bias)


class QATConv1D(Quantized, Conv1D):
    """GPT-2's linear layer, whose weight is (inputs, outputs), with quantized weights; see `transformers.Conv1D`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        rows = self.as_seen(x).view(-1, x.shape[-1])
        return torch.addmm(self.bias, rows, self.effective_weight).view(*x.shape[:-1], self.nf)


class QATExperts(Quantized, Experts):  # type: ignore[misc]
    """One weight of all experts of a block, quantized."""


QUANTIZED: dict[type, type] = {
    nn.Linear: QATLinear, nn.Embedding: QATEmbedding, nn.Conv1d: QATConv1d, nn.Conv2d: QATConv2d,
    Conv1D: QATConv1D, Experts: QATExperts}
PLAIN = {ours: kind for kind, ours in QUANTIZED.items()}
Rules = Sequence[tuple[str, WeightQuantizer | None]]


def prepare(model: nn.Module, quantizer: WeightQuantizer, ignore: Iterable[str] = ("lm_head",), rules: Rules = (),
            activations: ActivationQuantizer | None = None, embeddings: bool = False) -> list[str]:
    """Turn the linear and convolutional layers of `model` into ones that see quantized weights, in place.

    Args:
        model: any module.
        quantizer: what quantizes every layer that no rule is for.
        ignore: shell-style patterns of names to leave in full precision.
        rules: patterns with a quantizer of their own, or None for full precision; the first that matches decides.
        activations: what quantizes the inputs of linear and convolutional layers.
        embeddings: whether embeddings are quantized, and heads that share their weights. Without it such a head is left
            alone, since the embedding reads its weights too.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no layer is left to quantize, a pattern matches nothing, a group does not divide a layer, or weights
            are not finite or all zero. The model is then as it was.
    """
    chosen = choose(model, quantizer, ignore, rules, embeddings)
    for name, (module, own) in chosen.items():
        own.check(as_matrix(module), name)
    kept: dict[int, Any] = {}  # by weight: layers that share it share its scales
    for module, own in chosen.values():
        become_quantized(module, own, activations)
        twin = kept.setdefault(id(module.weight), module)
        if twin is not module:
            if own.searched:
                module.first_ratio, module.log_ratio = twin.first_ratio, twin.log_ratio
        elif own.searched:
            module.search()
    return list(chosen)


def become_quantized(layer: Any, quantizer: WeightQuantizer, activations: ActivationQuantizer | None) -> None:
    """Make a layer, in place, one that sees quantized weights."""
    layer.__class__ = QUANTIZED[type(layer)]
    layer.quantizer = quantizer
    if isinstance(layer, Experts):
        holder: Any = layer.holder
        if not hasattr(holder, "quantized_experts"):
            holder.__class__, holder.quantized_experts = seeing(type(holder)), {}  # type: ignore[arg-type]
        holder.quantized_experts[layer.key] = layer
    elif activations is not None and not isinstance(layer, nn.Embedding):
        layer.activations = activations


def become_plain(layer: Any) -> None:
    """Make a quantized layer, in place, what it was, its weight as it is."""
    layer.__class__ = PLAIN.get(type(layer), nn.Linear)
    del layer.quantizer
    layer.__dict__.pop("activations", None)
    for name in (*PARTS, "outliers", "whole"):
        if hasattr(layer, name):
            delattr(layer, name)
    if isinstance(layer, Experts) and hasattr(layer.holder, "quantized_experts"):
        plain(layer.holder)


def choose(model: nn.Module, quantizer: WeightQuantizer, ignore: Iterable[str], rules: Rules, embeddings: bool
           ) -> dict[str, tuple[nn.Module, WeightQuantizer]]:
    """The layers that `prepare` quantizes, each with its quantizer."""
    kinds = tuple(kind for kind in QUANTIZED if embeddings or kind is not nn.Embedding)
    layers = [(name, module) for name, module in all_layers(model) if type(module) in kinds]
    patterns = [(pattern, None) for pattern in ignore] + list(rules)
    weights = {one for name, weight in model.named_parameters() if weight.ndim > 1
               for one in (name, name.removesuffix(".weight"))}
    for pattern, own in patterns:
        known = chain((name for name, _ in layers), weights if own is None else ())
        # `lm_head` is in the default pattern: a model without one has nothing to be warned about.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"the pattern {pattern!r} in `ignore` or `rules` matches no layer; names look like "
                             f"{', '.join(name for name, _ in layers[:3])}")
    read = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    chosen = {}
    for name, module in layers:
        asked = read.get(id(module.weight), name) if embeddings else name  # a tied head is what its embedding is
        own = next((own for pattern, own in patterns if fnmatchcase(asked, pattern)), quantizer)
        if own is not None and (embeddings or id(module.weight) not in read):
            chosen[name] = module, own
    if not chosen:
        raise ValueError("there is no linear layer to quantize" + (f" outside {[name for name, _ in patterns]}"
                                                                   if layers else ""))
    return chosen


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Every fake-quantized layer with its name."""
    return ((name, layer) for name, layer in all_layers(model) if isinstance(layer, Quantized))


def set_bits(model: nn.Module, bits: int) -> None:
    """Give layers of whole numbers other bits, but no fewer than they were prepared for.

    For schedules that lower bits slowly: a learned scale keeps its share of the range. Layers that have the same
    quantizer before have the same one after.
    """
    changed: dict[tuple[WeightQuantizer, int], WeightQuantizer] = {}
    for _, layer in quantized_layers(model):
        before = layer.quantizer
        own: int = layer.__dict__.setdefault("own_bits", before.bits or 0)
        wanted = max(bits, own)
        if before.kind == "int" and before.bits != wanted:
            layer.quantizer = changed.setdefault((before, wanted), replace(before, bits=wanted))

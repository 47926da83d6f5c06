"""Quantization-aware training: layers that compute with fake-quantized weights and, optionally, activations."""

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
from strategies.quantization.quantized_product import quantized_product, serves
from strategies.quantization.quantizer import Grid, WeightQuantizer

# A ratio r is stored as r_0, which is not trained and exact in half precision, and a = log(r / r_0) + OFFSET. A step of
# any optimizer then changes r in proportion to r, even an optimizer whose steps are proportional to the parameter; and
# if an engine gathers in half precision, r is rounded no worse than weights are, as numbers near 0 are closely spaced.
OFFSET = 0.5


class Quantized:
    """A layer whose forward uses fake-quantized weights; its parameter and the optimizer stay in full precision.

    The weight keeps its name, so state dicts, sharding and checkpoints are not affected. A scale that is searched for
    or learned is a separate parameter, `log_ratio` (outputs * groups): a vector, so that no optimizer decays or factors
    it; `first_ratio` is its initial value. A grid found after training is in `scale` (outputs, groups) and
    `zero_point`, parameters without a gradient. The calibrated scale of static activations is `input_scale` (1,).
    """

    weight: nn.Parameter
    quantizer: WeightQuantizer
    activations: ActivationQuantizer | None = None
    input_scale: nn.Parameter

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as it is quantized, (outputs, ...)."""
        return as_matrix(self)

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """(outputs, ...) in the shape of the weight."""
        return as_weight(self, matrix)

    @property
    def effective_weight(self) -> torch.Tensor:
        """The fake-quantized weight that the forward uses."""
        fixed = self._fixed()
        return self.as_weight(self.quantizer.fake_quantize(self.matrix, None if fixed else self._ratio(), fixed))

    def grid(self) -> Grid:
        """The scales and zero points in use."""
        return self._fixed() or self.quantizer.grid(self.matrix, self._ratio())

    def numbers(self) -> torch.Tensor:
        """The weight's quantized numbers, (outputs, ...)."""
        return self.quantizer.numbers(self.matrix, self.grid())

    def search(self) -> None:
        """Find the scale of the least squared error and store its ratio as a parameter, trained if it is learned."""
        ratio = self.quantizer.first_ratio(self.matrix).flatten()
        ratio = torch.where(ratio == 0, torch.ones_like(ratio), ratio)  # where all weights are zero
        first = ratio.bfloat16().to(ratio.dtype)
        self.first_ratio = nn.Parameter(first, requires_grad=False)
        self.log_ratio = nn.Parameter((ratio / first).log() + OFFSET, requires_grad=self.quantizer.rule == "learned")

    def fix(self, grid: Grid) -> None:
        """Use this grid from now on, whatever the weights become."""
        self.scale = nn.Parameter(grid.scale.detach().clone(), requires_grad=False)
        if grid.zero_point is not None:
            self.zero_point = nn.Parameter(grid.zero_point.detach().float().clone(), requires_grad=False)

    def product(self, values: torch.Tensor, bias: torch.Tensor | None, turned: bool = False) -> torch.Tensor:
        """Values (..., inputs) times the fake-quantized weight, plus a bias: (..., outputs)."""
        fixed = self._fixed()
        ratio = None if fixed else self._ratio()
        return quantized_product(values, self.weight, ratio, bias, fixed or self.quantizer.grid(self.matrix, ratio),
                                 self.quantizer, turned)

    def _ratio(self) -> torch.Tensor | None:
        """Ratio of the scale to the covering one, (outputs, groups), if one is kept."""
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
        """The layer's input as it is quantized."""
        if self.activations is None:
            return values
        return self.activations.fake_quantize(values, getattr(self, "input_scale", None))


class QATLinear(Quantized, nn.Linear):  # type: ignore[misc]  # torch calls a weight a Tensor, here and below
    """A linear layer with fake-quantized weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        values = self.as_seen(input)
        if serves(self.weight) and values.ndim > 1:
            return self.product(values, self.bias)
        return nn.functional.linear(values, self.effective_weight, self.bias)


class QATEmbedding(Quantized, nn.Embedding):  # type: ignore[misc]
    """An embedding with fake-quantized vectors."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)"""
        return nn.functional.embedding(input, self.effective_weight, self.padding_idx, self.max_norm, self.norm_type,
                                       self.scale_grad_by_freq, self.sparse)


class QATConv1d(Quantized, nn.Conv1d):  # type: ignore[misc]
    """A 1-d convolution with fake-quantized kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, channels, length) -> (batch, outputs, length)"""
        return self._conv_forward(self.as_seen(input), self.effective_weight, self.bias)


class QATConv2d(Quantized, nn.Conv2d):  # type: ignore[misc]
    """A 2-d convolution with fake-quantized kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, outputs, height, width)"""
        return self._conv_forward(self.as_seen(input), self.effective_weight, self.bias)


class QATConv1D(Quantized, Conv1D):
    """GPT-2's linear layer with fake-quantized weights (inputs, outputs); see `transformers.pytorch_utils.Conv1D`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        rows = self.as_seen(x).view(-1, x.shape[-1])
        product = (self.product(rows, self.bias, turned=True) if serves(self.weight)
                   else torch.addmm(self.bias, rows, self.effective_weight))
        return product.view(*x.shape[:-1], self.nf)


class QATExperts(Quantized, Experts):  # type: ignore[misc]
    """One fake-quantized weight of all experts of a block."""


QUANTIZED: dict[type, type] = {
    nn.Linear: QATLinear, nn.Embedding: QATEmbedding, nn.Conv1d: QATConv1d, nn.Conv2d: QATConv2d,
    Conv1D: QATConv1D, Experts: QATExperts}
PLAIN = {ours: kind for kind, ours in QUANTIZED.items()}
Rules = Sequence[tuple[str, WeightQuantizer | None]]


def prepare(model: nn.Module, quantizer: WeightQuantizer, ignore: Iterable[str] = ("lm_head",), rules: Rules = (),
            activations: ActivationQuantizer | None = None, embeddings: bool = False) -> list[str]:
    """Turn the linear and convolutional layers of `model`, in place, into ones with fake-quantized weights.

    Args:
        model: any module.
        quantizer: quantizer of every layer that no rule matches.
        ignore: shell-style patterns of names to leave in full precision.
        rules: patterns with a quantizer of their own, or None for full precision; the first match decides.
        activations: quantizer of the inputs of linear and convolutional layers.
        embeddings: whether to quantize embeddings, and heads that share their weights. Without it such a head is left
            alone, because the embedding uses its weights too.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no layer is left to quantize, a pattern matches nothing, the group size does not divide a layer's
            inputs, or weights are not finite or all zero. The model is then unchanged.
    """
    chosen = choose(model, quantizer, ignore, rules, embeddings)
    for name, (module, own) in chosen.items():
        own.check(as_matrix(module), name)
    kept: dict[int, Any] = {}  # by weight: layers that share a weight share its scales
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
    """Turn a layer, in place, into one with fake-quantized weights."""
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
    """Turn a quantized layer, in place, back into its original class, without changing its weight."""
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
        # `lm_head` is the default pattern, so a model without one is no mistake.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"the pattern {pattern!r} in `ignore` or `rules` matches no layer; names look like "
                             f"{', '.join(name for name, _ in layers[:3])}")
    read = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    chosen = {}
    for name, module in layers:
        asked = read.get(id(module.weight), name) if embeddings else name  # a tied head is treated as its embedding
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
    """Change the bits of integer layers, but to no fewer than they were prepared for.

    This is for schedules that lower bits gradually: a learned scale keeps its fraction of the range. Layers that shared
    a quantizer before share one afterwards.
    """
    changed: dict[tuple[WeightQuantizer, int], WeightQuantizer] = {}
    for _, layer in quantized_layers(model):
        before = layer.quantizer
        own: int = layer.__dict__.setdefault("own_bits", before.bits or 0)
        wanted = max(bits, own)
        if before.kind == "int" and before.bits != wanted:
            layer.quantizer = changed.setdefault((before, wanted), replace(before, bits=wanted))

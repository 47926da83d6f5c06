"""Quantisation-aware training: linear layers that see their own quantised weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from strategies.quantization.quantizer import WeightQuantizer


class QATLinear(nn.Linear):
    """A linear layer whose forward uses fake-quantised weights; weight and optimizer see full precision.

    The parameter keeps its name (`weight`), so state dicts, sharding and checkpoints do not notice.
    """

    quantizer: WeightQuantizer

    @property
    def effective_weight(self) -> torch.Tensor:
        """(outputs, inputs) weights as they are multiplied with."""
        return self.quantizer.fake_quantize(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        return nn.functional.linear(input, self.effective_weight, self.bias)


def prepare(model: nn.Module, quantizer: WeightQuantizer, ignore: Iterable[str] = ("lm_head",)) -> list[str]:
    """Turn the linear layers of `model` into `QATLinear`, in place, and return their names.

    Args:
        model: any module; layers whose weight is tied to an embedding are left alone, since the embedding reads it too.
        quantizer: what quantises every layer.
        ignore: shell-style patterns of names to leave in full precision.

    Raises:
        ValueError: no layer is left to quantise, a pattern matches nothing, or a group does not divide a layer.
    """
    patterns = list(ignore)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for pattern in patterns:
        # `lm_head` is in the default pattern: a model without one has nothing to be warned about.
        if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name, _ in linear):
            raise ValueError(f"the pattern {pattern!r} in `ignore` matches no linear layer; names look like "
                             f"{', '.join(name for name, _ in linear[:3])}")
    chosen = [(name, module) for name, module in linear
              if id(module.weight) not in embeddings and not any(fnmatchcase(name, one) for one in patterns)]
    if not chosen:
        raise ValueError("there is no linear layer to quantise" + (f" outside {patterns}" if linear else ""))
    for name, module in chosen:
        quantizer.check(module.weight, name)
    for _, module in chosen:
        module.__class__ = QATLinear
        module.quantizer = quantizer
    return [name for name, _ in chosen]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QATLinear]]:
    """Every fake-quantised layer with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QATLinear))

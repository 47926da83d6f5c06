"""Fixing the quantised weights: the same student as a plain model."""

from __future__ import annotations

import torch
from torch import nn

from strategies.quantization.qat import quantized_layers


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Replace every fake-quantised layer, in place, by a linear layer that holds the quantised values.

    Full precision is lost for good: this is the model that is served, not one to train on.
    """
    for _, layer in list(quantized_layers(model)):
        layer.weight.copy_(layer.quantizer.fake_quantize(layer.weight))
        layer.__class__ = nn.Linear
        del layer.quantizer
    return model

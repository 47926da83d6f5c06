"""Fixing the quantised weights: the same student as a plain model."""

from __future__ import annotations

import torch
from torch import nn

from strategies.quantization.qat import quantized_layers


@torch.no_grad()
def bake(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Turn a trained model, in place, into the one that is served: quantised values in plain layers, all in `dtype`.

    Only what is saved is cast. `model.to(dtype)` would also round the buffers that a model computes for itself, such
    as rotary frequencies, which loading leaves in fp32: logits then differ by a percent.
    """
    for _, layer in list(quantized_layers(model)):
        layer.weight.copy_(layer.quantizer.fake_quantize(layer.weight))
        layer.__class__ = nn.Linear
        del layer.quantizer
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model

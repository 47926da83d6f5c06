"""Turn a quantized student into a plain model whose weights are the dequantized values."""

from __future__ import annotations

import torch
from torch import nn

from strategies.quantization.qat import PLAIN, become_plain, quantized_layers


@torch.no_grad()
def freeze_quantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Turn a trained model, in place, into the one to serve: quantized values in plain layers, all in `dtype`.

    Layers that quantize their activations keep doing so. Only tensors in the state dict are cast: `model.to(dtype)`
    would also round buffers that a model computes for itself, such as rotary frequencies, which loading leaves in fp32,
    and logits would then differ by a percent.

    Raises:
        ValueError: a layer quantizes only some of its input columns, which no plain layer does. The model is then
            unchanged.
    """
    for name, layer in quantized_layers(model):
        if type(layer) not in PLAIN and layer.activations is not None:
            raise ValueError(f"{name} has columns of full precision beside rounded ones, which no plain layer computes")
    done: set[int] = set()
    for _, layer in list(quantized_layers(model)):
        if id(layer.weight) not in done:  # a second time would quantize quantized weights
            done.add(id(layer.weight))
            layer.weight.copy_(layer.effective_weight)
    for _, layer in list(quantized_layers(model)):
        activations = layer.activations
        become_plain(layer)
        if activations is not None:
            layer.register_forward_pre_hook(_Rounds(activations))
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


class _Rounds:
    """Forward pre-hook that quantizes a layer's input."""

    def __init__(self, activations) -> None:
        self.activations = activations

    def __call__(self, layer: nn.Module, inputs: tuple) -> tuple:
        return self.activations.fake_quantize(inputs[0], getattr(layer, "input_scale", None)), *inputs[1:]

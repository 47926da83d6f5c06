"""The frozen base of an adapter in the numbers that `student.quantization` exports: held so, and made a model again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from strategies.adapters.frozen_weights import GivenNumbers, PackedLinear
from strategies.adapters.low_rank import bare, base_of
from strategies.quantization.given_numbers import hold_numbers, packed_numbers
from strategies.quantization.qat import choose
from strategies.quantization.quantizer import WeightQuantizer
from trainer.errors import error_context
from trainer.experiment.experiment import StudentForm
from trainer.models.full_precision import ignored, without_place

WAY_OUT = "name it in student.quantization.ignore, or use nf4, bfloat16 or float32"


def check_quantized_base(form: StudentForm, model: nn.Module) -> None:
    """Check that a model without adapters can be held in the numbers of its quantization; shapes are enough.

    Raises:
        UserError: a layer that is quantized is no linear layer, or is the output head.
    """
    with error_context("student.adapter.base", value="quantized", way_out=WAY_OUT):
        for name, (layer, _) in _quantized(form, model).items():
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"{name} is a {type(layer).__name__}, and quantized numbers are held packed in linear "
                                 "layers")
            if layer is model.get_output_embeddings():
                raise ValueError(f"{name} is the output head, which is held in 16 bits beneath an adapter")


def given_numbers(form: StudentForm, model: nn.Module) -> GivenNumbers:
    """What holds a model's weights in the numbers of its quantization; the model has no adapters yet."""
    return GivenNumbers({name: partial(_packed, name, quantizer) for name, (_, quantizer)
                         in _quantized(form, model).items()}, getattr(torch, form.dtype))


def quantized_base(form: StudentForm, model: nn.Module, plain: nn.Module) -> nn.Module:
    """The base of a model with adapters as a quantized model, with exactly the numbers and scales it was held in.

    Args:
        plain: a model of the same configuration without adapters, which becomes it.
    """
    chosen, held = _quantized(form, plain), base_of(model)
    bare(model, plain)
    for name, (layer, quantizer) in chosen.items():
        packed: Any = held.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        hold_numbers(layer, quantizer, *packed.stored)
    plain.generation_config = model.generation_config
    return plain.eval()


def _quantized(form: StudentForm, model: nn.Module) -> dict[str, tuple[nn.Module, WeightQuantizer]]:
    asked = form.quantization
    assert asked is not None, "the experiment checks that a quantized base has numbers"
    dtype = getattr(torch, form.dtype)
    left = without_place(model, asked, dtype)
    return choose(model, asked.build(dtype), ignored(asked, left), asked.rules(dtype), asked.embeddings)


def _packed(name: str, quantizer: WeightQuantizer, weight: torch.Tensor) -> Any:
    with error_context("student.quantization", way_out=f"name {name} in student.quantization.ignore, or leave "
                       "quantization out"):
        quantizer.check(weight, name)
    return packed_numbers(quantizer, weight)

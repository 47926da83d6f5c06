"""Computes a model in float64, whatever its weights are stored in, with a copy of one weight at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

TO_SINGLE = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type)
LOOKED_UP = (nn.functional.embedding,)


class DoublePrecision(TorchFunctionMode):
    """Within the context, operations that meet a float64 tensor are carried out in float64; so are embeddings.

    Models ask for fp32 in places, such as norms and softmax. That is not heeded: two models that differ in which zeros
    they add would round differently there, and deep models enlarge such differences beyond 1e-5 of a logit.
    """

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in LOOKED_UP:
            return func(*args, **kwargs).double()
        if not any(_is(one, torch.float64) for one in _flat((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func in TO_SINGLE and _is(args[0], torch.float64) and self._single(func, args, kwargs):
            return args[0]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*_doubled(args), **{name: _doubled(value) for name, value in kwargs.items()})

    @staticmethod
    def _single(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        return func is torch.Tensor.float or any(
            one in (torch.float32, torch.bfloat16, torch.float16) or _is(one, torch.float32)
            for one in (*args[1:], *kwargs.values()) if isinstance(one, (torch.dtype, torch.Tensor)))


def doubled(batch: Any) -> Any:
    """A batch with its fp32 tensors in float64."""
    return {name: _doubled(value) for name, value in batch.items()}


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is dtype


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for one in values:
        if isinstance(one, (tuple, list)):
            yield from _flat(one)
        else:
            yield one


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else value
    return type(value)(_doubled(one) for one in value) if type(value) in (tuple, list) else value

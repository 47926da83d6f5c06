"""Shapes of a model's tensors for a configuration, built on the meta device: which configurations are models at all.

Configurations have names of their own for the same numbers, and some cannot say a number at all. Whether one can is
found by building the model before and after, and comparing the shapes of its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from strategies.common.model_tasks import task_of

FARTHEST = 256  # how far from a count that a model cannot have the nearest one is looked for
AUTO = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification,
        "token_classification": AutoModelForTokenClassification,
        "image_classification": AutoModelForImageClassification}


def tensor_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters and saved buffers, by name, without weights.

    Raises:
        ValueError: there is no such model.
    """
    return dict(_shapes(_Hashable(config)))


def model_class(config: PretrainedConfig) -> Any:
    """The class that a configuration names, or that of its task."""
    return getattr(transformers, (config.architectures or [""])[0], None) or AUTO[task_of(config)]


class _Hashable:
    """A configuration as a key of a cache."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self.text = config, f"{type(config)}{config.architectures}{config.to_dict()}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.text == other.text


@lru_cache(maxsize=64)
def _shapes(key: _Hashable) -> tuple[tuple[str, tuple[int, ...]], ...]:
    config = _validated(key.config)
    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)
    except Exception as error:  # each model class refuses in its own way
        raise ValueError(f"a {config.model_type} model cannot be built so: {_last(error)}") from error
    return tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def _validated(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration as a file of it is read again."""
    try:
        return type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:  # each configuration class validates in its own way
        raise ValueError(f"a {config.model_type} configuration cannot say so: {_last(error)}") from error


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def changed(config: PretrainedConfig, **values: Any) -> PretrainedConfig:
    """A copy with other values."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def refused(config: PretrainedConfig, what: str) -> ValueError:
    return ValueError(f"{what} of a {config.model_type} model cannot be cut")


def nearest(count: int, most: int, works: Callable[[int], bool], step: int = 1) -> int | None:
    """The count nearest to one that does not work, of 1 to `most` - 1 in steps; None if there is none near."""
    for distance in range(step, FARTHEST * step, step):
        for other in (count - distance, count + distance):
            if 0 < other < most and works(other):
                return other
    return None


def feasible(config: PretrainedConfig, name: str, asked: float | int, count: int, most: int,
              made: Callable[[int], PretrainedConfig], step: int = 1) -> int:
    """`count`, or for a fraction the nearest count, with which the model can be built.

    Raises:
        ValueError: there is none, or an exact count was asked for that it cannot have.
    """
    def works(number: int) -> bool:
        try:
            tensor_shapes(made(number))
        except ValueError:
            return False
        return True

    if works(count):
        return count
    other = nearest(count, most, works, step)
    if other is not None and not isinstance(asked, int):
        return other
    try:
        tensor_shapes(made(count))
    except ValueError as error:
        raise ValueError(f"{name}: {count} of {most} is no {config.model_type} model ({error})"
                         + (f"; the nearest that is: {other}" if other else "")) from error
    return count


def builds(config: PretrainedConfig) -> bool:
    try:
        tensor_shapes(config)
    except ValueError:
        return False
    return True


def setting(config: PretrainedConfig, name: str) -> Callable[[int], PretrainedConfig]:
    return lambda number: changed(config, **{name: number})

"""Watches which weights a forward multiplies with, and by what: also weights that no layer of their own holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

See = Callable[[str, int | None, int, torch.Tensor, Any], Any]


class WeightReads(TorchFunctionMode):
    """Within the context, `see(name, part, dim, inputs, output)` is called for every product with a weight.

    `name` is the weight's, `part` its expert where experts are stacked, `dim` the weight's dimension that is summed
    over, `inputs` what it is multiplied with: channels last, or (rows, channels, height, width) for a convolution. What
    `see` returns takes the place of the output, if it is not None.
    """

    def __init__(self, model: nn.Module, see: See) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._see = see
        self._experts: dict[int, tuple[torch.Tensor, str, int]] = {}  # slices of stacked experts that were taken last

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            self._remember(args, output)
            return output
        place = {nn.functional.linear: (0, 1), torch.addmm: (1, 2), torch.conv2d: (0, 1)}.get(func)
        if place is None or len(args) <= place[1]:
            return output
        inputs, weight = args[place[0]], args[place[1]]
        name, part = self._weight(weight)
        if name is None:
            return output
        dim = 0 if func is torch.addmm else 1 if func is torch.conv2d else weight.ndim - 1
        if func is torch.conv2d and weight.shape[1] != inputs.shape[1]:
            return output  # by groups: channels are not summed over
        seen = self._see(name, part, dim if part is None else dim + 1, inputs, output)
        return output if seen is None else seen

    def _remember(self, args: tuple, output: Any) -> None:
        """A slice of a weight that stacks experts, of the expert that it is of."""
        name, index = self._names.get(id(args[0])), args[1]
        if name is not None and args[0].ndim == 3 and not isinstance(index, (slice, tuple)):
            if len(self._experts) > 8:
                self._experts.clear()
            self._experts[id(output)] = (output, name, int(index))

    def _weight(self, weight: torch.Tensor) -> tuple[str | None, int | None]:
        if id(weight) in self._experts:
            return self._experts[id(weight)][1:]
        return self._names.get(id(weight)), None

"""Watches which weights a forward multiplies with, and by what: also weights that no layer of their own holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

See = Callable[[str, int | None, int, torch.Tensor, Any], Any]
PRODUCTS: dict[Any, tuple[int, int]] = {  # places of the inputs and of the weight among the arguments
    nn.functional.linear: (0, 1), torch.conv2d: (0, 1), torch.addmm: (1, 2), torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1), torch.Tensor.__matmul__: (0, 1)}


class _View(NamedTuple):
    """A weight, one expert of it, or its transpose."""

    name: str
    part: int | None = None
    turned: bool = False


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
        self._views: dict[int, tuple[torch.Tensor, _View]] = {}  # the last ones; held, so that ids are not reused

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.T.__get__):
            self._remember(args, output)
            return output
        first, second = PRODUCTS.get(func, (0, len(args)))
        view = self._view(args[second]) if second < len(args) else None
        if view is None:
            return output
        inputs, weight = args[first], args[second]
        if func is torch.conv2d and weight.shape[1] != inputs.shape[1]:
            return output  # by groups: channels are not summed over
        dim = 1 if func in (nn.functional.linear, torch.conv2d) else 0
        if view.turned:
            dim = 1 - dim
        seen = self._see(view.name, view.part, dim if view.part is None else dim + 1, inputs, output)
        return output if seen is None else seen

    def _remember(self, args: tuple, output: Any) -> None:
        """A transposed weight, or a slice of one expert of a weight that stacks them."""
        name = self._names.get(id(args[0]))
        if name is None or len(args) > 1 and (args[0].ndim != 3 or isinstance(args[1], (slice, tuple))):
            return
        if len(self._views) > 8:
            self._views.clear()
        self._views[id(output)] = (output, _View(name, int(args[1]) if len(args) > 1 else None, len(args) == 1))

    def _view(self, weight: Any) -> _View | None:
        if id(weight) in self._views:
            return self._views[id(weight)][1]
        name = self._names.get(id(weight))
        return None if name is None else _View(name)

"""Which channels of a convolutional network belong together, found by following them through a forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from strategies.common.blockwise_calibration import Batch
from strategies.pruning.structured.calibration_rows import inputs_of
from strategies.pruning.structured.config_steps import Step
from strategies.pruning.structured.unit_spaces import Site, Space, best, changed_dims

Dim = tuple[str, int]  # a tensor's name and dimension


class _Followed(TorchFunctionMode):
    """Joins dimensions of weights whose channels are the same, because tensors of channels pass from one to another.

    Attributes:
        joined: (name, dimension) of each weight dimension met, and a representative of those it is joined with.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(one): name for name, one in (*model.named_parameters(), *model.named_buffers())}
        self._of: dict[int, tuple[torch.Tensor, Dim]] = {}  # held, so that no other tensor takes its id
        self.joined: dict[Dim, Dim] = {}

    def root(self, dim: Dim) -> Dim:
        """The representative of a dimension."""
        self.joined.setdefault(dim, dim)
        while self.joined[dim] != dim:
            dim = self.joined[dim]
        return dim

    def join(self, one: Dim, other: Dim) -> None:
        """Let two dimensions have the same channels."""
        self.joined[self.root(one)] = self.root(other)

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = list(_tensors((*args, *(kwargs or {}).values())))
        if func in (torch.conv2d, nn.functional.linear):
            self._multiplied(tensors, output)
        elif isinstance(output, torch.Tensor):
            self._passed(func, tensors, output)
        return output

    def _multiplied(self, tensors: list[torch.Tensor], output: torch.Tensor) -> None:
        """A convolution or linear layer: its input has the channels of the weight's dimension 1, its output of 0."""
        inputs, weight, *bias = tensors
        name = self._names.get(id(weight))
        if name is None:
            return
        known = self._of.get(id(inputs))
        if weight.ndim == 4 and weight.shape[1] == 1 and weight.shape[0] == inputs.shape[1]:  # one filter a channel
            if known:
                self.join((name, 0), known[1])
        elif known and weight.shape[1] == inputs.shape[1]:
            self.join((name, 1), known[1])
        for one in bias:
            self.join((self._names[id(one)], 0), (name, 0))
        self._of[id(output)] = (output, (name, 0))

    def _passed(self, func: Any, tensors: list[torch.Tensor], output: torch.Tensor) -> None:
        """Any other operation: what has as many channels as its output has the same."""
        count = output.shape[1] if output.ndim > 1 else 0
        known = [self._of[id(one)][1] for one in tensors if id(one) in self._of and one.shape[1] == count]
        if not known or func is torch.cat:
            return
        for other in known[1:]:
            self.join(other, known[0])
        for one in tensors:  # weights and statistics of a norm
            if id(one) in self._names and one.shape == (count,):
                self.join((self._names[id(one)], 0), known[0])
        self._of[id(output)] = (output, known[0])


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for one in values:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


@torch.no_grad()
def channel_spaces(model: nn.Module, before: PretrainedConfig, step: Step, batch: Batch) -> list[Space]:
    """Spaces of the channels that change with the configuration.

    Raises:
        ValueError: a dimension changes that no channel was followed to, or joined ones change differently.
    """
    first = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs_of(batch).items()}
    with _Followed(model) as followed:
        model(**first)
    groups: dict[Dim, list[tuple[str, int, int, int]]] = defaultdict(list)
    for name, dims in changed_dims(before, step.config).items():
        for dim, old, new in dims:
            if (name, dim) not in followed.joined:
                raise ValueError(f"channels: those of {name} in a {before.model_type} model cannot be followed")
            groups[followed.root((name, dim))].append((name, dim, old, new))
    spaces: list[Space] = []
    for found in groups.values():
        name, _, old, new = found[0]
        if any(sizes[2:] != (old, new) for sizes in found):
            raise ValueError(f"channels: those of {name} are also those of other layers, and its configuration cannot "
                             "say their number")
        label = f"channels {min(one[0] for one in found).rpartition('.')[0]}"
        spaces.append(Space(label, old, best(new), [Site(one[0], one[1], torch.arange(old)) for one in found]))
    return spaces

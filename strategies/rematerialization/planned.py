"""A model carrying out its plan: every region runs by its schedule, whoever calls the model."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from strategies.rematerialization.capture import Captured
from strategies.rematerialization.chain import Block, Option, Schedule, Segment, leaves
from strategies.rematerialization.execute import compiled, own_forward, replace_forward, restore_forward
from strategies.rematerialization.fallback import CHECKPOINT, KEEP
from strategies.rematerialization.regions import first_line
from strategies.rematerialization.segments import Recorder


@dataclass
class Planned:
    """The schedules of a model's regions, installed in it.

    Attributes:
        modules: regions in the order the model calls them.
        schedule: which option each runs by, and which are segments.
        options: for every region, its options.
        orders: how to run a captured graph by an option; called with (captured, option) for shapes not planned for too.
    """

    modules: Sequence[nn.Module]
    schedule: Schedule
    options: Sequence[Sequence[Option]]
    orders: Callable[[Captured, Option], Sequence[int]]
    inductor: bool = False
    _functions: dict[int, Callable] = field(default_factory=dict)
    _opened: tuple[int, Recorder] | None = None
    _failed: set[str] = field(default_factory=set)

    def install(self) -> None:
        """Replace the regions' forwards."""
        self._option = {position: self.options[position][which] for item in self.schedule
                        for position, which in leaves(item)}
        self._segment = {position: item for item in self.schedule if isinstance(item, Segment)
                         for position in range(item.first, item.last)}
        for position, module in enumerate(self.modules):
            PlannedForward(self, position, module).install()

    def remove(self) -> None:
        """Give the regions their own forwards back."""
        for module in self.modules:
            if isinstance(module.__dict__.get("forward"), PlannedForward):
                restore_forward(module)

    def call(self, position: int, module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Run a region as its place in the schedule says."""
        run = self._run(position)
        segment = self._segment.get(position)
        if segment is None:
            self._opened = None
            return run(module, *args, **kwargs)
        if position == segment.first:
            self._opened = (position, Recorder(segment))
        if self._opened is None or self._opened[0] != position:  # the model calls its blocks in another order today
            self._opened = None
            return run(module, *args, **kwargs)
        recorder = self._opened[1]
        out = recorder.call(run, module, args, kwargs)
        self._opened = None if position + 1 == segment.last else (position + 1, recorder)
        return out

    def _run(self, position: int) -> Callable:
        option = self._option[position]
        if id(option) not in self._functions:
            self._functions[id(option)] = self._by(option)
        return self._functions[id(option)]

    def _by(self, option: Option) -> Callable:
        if option.mode == KEEP:
            return own_forward
        if option.mode == CHECKPOINT:
            return checkpointed
        function = compiled(lambda captured: self.orders(captured, option), self.inductor)

        def run(module: nn.Module, *args, **kwargs):
            try:
                return function(module, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._warn(module, error)
                return checkpointed(module, *args, **kwargs)
        return run

    def _warn(self, module: nn.Module, error: Exception) -> None:
        name = type(module).__name__
        if name not in self._failed:
            self._failed.add(name)
            warnings.warn(f"{name} runs by block checkpointing where its plan does not hold: {first_line(error)}",
                          stacklevel=4)


class PlannedForward:
    """Stands for a module's forward. Copies of the module, and pickles, have the module's own forward again."""

    def __init__(self, planned: Planned, position: int, module: nn.Module) -> None:
        self.planned = planned
        self.position = position
        self.module = module

    def install(self) -> None:
        """Become the module's forward."""
        replace_forward(self.module, self)

    def __call__(self, *args, **kwargs):
        if not _takes_part(self.module, args, kwargs):
            return own_forward(self.module, *args, **kwargs)
        return self.planned.call(self.position, self.module, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        return types.MethodType(type(self.module).forward, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple:
        return types.MethodType, (type(self.module).forward, self.module)


def checkpointed(module: nn.Module, *args, **kwargs) -> object:
    """The module's forward, with nothing kept but its input."""
    return checkpoint(own_forward, module, *args, use_reentrant=False, **kwargs)


def _takes_part(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a gradient will come back through this call."""
    if not torch.is_grad_enabled():
        return False
    return (any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_flatten((args, kwargs))[0])
            or any(parameter.requires_grad for parameter in module.parameters()))


def whole(count: int, option: int = 0) -> Schedule:
    """A schedule in which every region runs by the option of one number."""
    return tuple(Block(position, option) for position in range(count))

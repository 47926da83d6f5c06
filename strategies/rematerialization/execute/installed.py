"""Install a plan in a model: every region's forward is replaced by one that follows its schedule."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from strategies.rematerialization.capture.call_arguments import takes_part, without_cache
from strategies.rematerialization.capture.compile_region import (
    compiled,
    own_forward,
    quiet,
    replace_forward,
    restore_forward,
)
from strategies.rematerialization.capture.joint_graph import Captured
from strategies.rematerialization.capture.partition import fits
from strategies.rematerialization.capture.regions import first_line
from strategies.rematerialization.execute.segments import Recorder
from strategies.rematerialization.solve.chain_program import (
    CHECKPOINT,
    KEEP,
    Block,
    ChainSchedule,
    Option,
    Segment,
    leaves,
)

SHAPES = 32  # most sets of shapes for which one option is captured; each takes about a second


@dataclass
class Planned:
    """The schedules of a model's regions, installed in it.

    Attributes:
        modules: regions in the order the model calls them.
        schedule: which option each runs by, and which form segments.
        options: for every region, its options.
        orders: returns the order for a captured graph under an option, (captured, option); also for shapes not planned
            for.
    """

    modules: Sequence[nn.Module]
    schedule: ChainSchedule
    options: Sequence[Sequence[Option]]
    orders: Callable[[Captured, Option], Sequence[int]]
    inductor: bool = False
    _functions: dict[tuple, Callable] = field(default_factory=dict)
    _apart: dict[tuple, int] = field(default_factory=dict)  # modules past the recompile limit of the first function
    _met: set[tuple] = field(default_factory=set)
    _opened: tuple[int, Recorder] | None = None
    _last: int = -1
    _warned: set[tuple] = field(default_factory=set)

    def install(self) -> None:
        """Replace the regions' forwards."""
        schedule = [self._unfolded(item) for item in self.schedule]
        self._option = {position: self.options[position][which] for item in schedule
                        for position, which in leaves(item)}
        self._segment = {position: item for item in schedule if isinstance(item, Segment)
                         for position in range(item.first, item.last)}
        places: dict[nn.Module, list[int]] = {}
        for position, module in enumerate(self.modules):
            places.setdefault(module, []).append(position)
        for module, positions in places.items():
            PlannedForward(self, positions, module).install()

    def remove(self) -> None:
        """Restore the regions' own forwards."""
        for module in self.modules:
            forward = installed(module)
            if forward is not None and forward.planned is self:
                forward.remove()

    def run_alone(self, position: int, args: tuple, kwargs: dict) -> object:
        """Run a region by its option, outside of the step and of segments."""
        return self._runner(self._option[position])(self.modules[position], *args, **kwargs)

    def _unfolded(self, item: Block | Segment) -> Block | Segment:
        """Turn a block that keeps only its input into a segment of one block that keeps everything when recomputed."""
        if isinstance(item, Segment):
            return Segment(item.first, item.last, tuple(map(self._unfolded, item.inside)))
        ways = self.options[item.position]
        if ways[item.option].mode != CHECKPOINT:
            return item
        keep = next(which for which, way in enumerate(ways) if way.mode == KEEP)
        return Segment(item.position, item.position + 1, (Block(item.position, keep),))

    def call(self, positions: Sequence[int], module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Run a region as its place in the schedule says; a module with several places takes them in turn."""
        position = next((position for position in positions if position > self._last), positions[0])
        self._last = position
        try:
            return self._call(position, module, args, kwargs)
        except BaseException:
            self._opened, self._last = None, -1  # the next step starts over
            raise

    def _call(self, position: int, module: nn.Module, args: tuple, kwargs: dict) -> object:
        run = self._runner(self._option[position])
        segment = self._segment.get(position)
        if segment is not None and position == segment.first:
            self._opened = (position, Recorder(segment))
        elif self._opened is not None and not (self._opened[0] == position and self._opened[1].follows(args, kwargs)):
            self._opened = None  # the model called its blocks in another order
        if segment is None or self._opened is None:
            self._opened = None
            return run(module, *args, **kwargs)
        recorder = self._opened[1]
        out = recorder.call(run, module, args, kwargs)
        self._opened = None if position + 1 == segment.last else (position + 1, recorder)
        return out

    def _runner(self, option: Option) -> Callable:
        if option.mode == KEEP:
            return own_forward

        def run(module: nn.Module, *args, **kwargs):
            kinds = id(option), _kinds(args, kwargs)
            while True:
                key = (*kinds, self._apart.get((*kinds, id(module)), 0))
                known = key in self._functions
                if not known:
                    self._functions[key] = self._made(option, module)
                try:
                    with nullcontext() if (key, id(module)) in self._met else quiet("torch._dynamo.convert_frame"):
                        self._met.add((key, id(module)))
                        return self._functions[key](module, *args, **kwargs)
                except (torch._dynamo.exc.FailOnRecompileLimitHit, torch._dynamo.exc.TorchDynamoException) as error:
                    if known and isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                        self._apart[*kinds, id(module)] = key[-1] + 1  # torch.compile limits graphs per function
                        continue
                    out = checkpointed(module, *args, **kwargs)  # raises the module's own error, if any
                    self._functions[key] = checkpointed
                    self._warn(module, first_line(error))
                    return out
        return run

    def _made(self, option: Option, module: nn.Module) -> Callable:
        """A new function for one option and set of shapes, because torch.compile counts recompilations by function."""
        if len({kinds for known, kinds, _ in self._functions if known == id(option)}) < SHAPES:
            return compiled(lambda captured: self._order(captured, option), self.inductor)
        self._warn(module, f"it has met more than {SHAPES} different shapes; pad batches to fewer lengths")
        return checkpointed

    def _order(self, captured: Captured, option: Option) -> Sequence[int]:
        """An option's order, for any shapes whose graph has the same operations; for others, one from `orders`."""
        return option.order if fits(captured, option.order) else self.orders(captured, option)

    @property
    def given_up(self) -> list[str]:
        """Reasons for which blocks have not run by their schedules."""
        return [reason for _, reason in self._warned]

    def _warn(self, module: nn.Module, reason: str) -> None:
        key = type(module), reason
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"{type(module).__name__} keeps only its input where its plan does not hold: {reason}",
                          stacklevel=6)


class PlannedForward:
    """Replaces a module's forward. Copies and pickles of the module get the module's own forward back.

    Args:
        planned: runs the module; None once removed.
        positions: the module's places in the schedule, several if it is called more than once in a step.
        module: the region.
    """

    def __init__(self, planned: Planned, positions: Sequence[int], module: nn.Module) -> None:
        self.planned: Planned | None = planned
        self.positions = positions
        self.module = module
        self.before: Callable | None = None

    def install(self) -> None:
        """Become the module's forward, replacing an older plan's."""
        older = installed(self.module)
        if older is not None:
            older.remove()
        self.before = self.module.__dict__.get("forward")
        replace_forward(self.module, self)
        INSTALLED[self.module] = weakref.ref(self)

    def remove(self) -> None:
        """Restore the module's forward; if others have wrapped this one meanwhile, only pass calls through."""
        self.planned = None
        INSTALLED.pop(self.module, None)
        if self.module.__dict__.get("forward") is self:
            restore_forward(self.module)

    @torch.compiler.disable  # torch.compile of the whole model leaves the plan in place
    def __call__(self, *args, **kwargs):
        if self.planned is None:
            return (self.before or partial(type(self.module).forward, self.module))(*args, **kwargs)
        if not takes_part(self.module, args, kwargs):
            return own_forward(self.module, *args, **kwargs)
        planned_args, planned_kwargs = without_cache(args, kwargs)
        if not self.module.training and (planned_args, planned_kwargs) != (args, kwargs):
            return own_forward(self.module, *args, **kwargs)  # the model is generating text
        return self.planned.call(self.positions, self.module, planned_args, planned_kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return types.MethodType(type(self.module).forward, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple:
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.module, "forward")  # on unpickling the module is still empty, so this is its class's


INSTALLED: WeakKeyDictionary[nn.Module, weakref.ref[PlannedForward]] = WeakKeyDictionary()  # also if wrapped since


def installed(module: nn.Module) -> PlannedForward | None:
    """The planned forward installed in a module, if any."""
    known = INSTALLED.get(module)
    return None if known is None else known()


def uninstall(model: nn.Module) -> None:
    """Remove any plans from a model."""
    for module in model.modules():
        forward = installed(module)
        if forward is not None:
            forward.remove()


def checkpointed(module: nn.Module, *args, **kwargs) -> object:
    """The module's forward, keeping only its input."""
    return Recorder(Segment(0, 1, (Block(0, 0),))).call(own_forward, module, args, kwargs)


def _kinds(args: tuple, kwargs: dict) -> tuple:
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else None
                 for leaf in tree_flatten((args, kwargs))[0])


def _same(value: object) -> object:
    return value


def whole(count: int, option: int = 0) -> ChainSchedule:
    """A schedule in which every region runs by its option number `option`."""
    return tuple(Block(position, option) for position in range(count))

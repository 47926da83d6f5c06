"""Blocks that are equal in everything that memory depends on: a few of them run, the others are counted as these.

A step of a deep model repeats one block. On tensors without data, what a block allocates and frees depends on its
class, the shapes of its weights, its plain attributes and its arguments. So of a run of equal blocks only five run:
three at its beginning and two at its end. A block between them returns what it is given, and the bytes of the two
blocks before it are put in its place, once they are found to be the same, change for change, in the forward and in the
backward. Where anything is not as expected, `Uneven` is raised, and the caller runs every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from strategies.memory.tracker import LiveBytes
from strategies.rematerialization.capture.compile_region import own_forward
from strategies.rematerialization.capture.regions import calling

FIRST, LAST = 3, 2  # blocks of a run that do run
NUMBER = "layer_idx"  # a block's number in its model, which blocks may differ in as long as they do not read it
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Uneven(Exception):
    """Blocks that look equal are not, or what runs around them depends on which of them ran."""


@dataclass
class EqualRun:
    """Consecutive equal blocks, and where each that ran began on the timeline of a `LiveBytes`.

    Attributes:
        blocks: (name, module), in order.
        forward, backward: timeline positions at which each block that runs began its forward and its backward.
    """

    blocks: Sequence[tuple[str, nn.Module]]
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    @property
    def running(self) -> list[tuple[str, nn.Module]]:
        """The blocks that run."""
        return [*self.blocks[:FIRST], *self.blocks[-LAST:]]

    @property
    def counted(self) -> list[tuple[str, nn.Module]]:
        """The blocks that do not run."""
        return list(self.blocks[FIRST:-LAST])

    def stands_for(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """For each parameter of a block that does not run, and the same parameter of a block that does."""
        one = dict(self.blocks[FIRST - 1][1].named_parameters())
        for _, block in self.counted:
            for name, parameter in block.named_parameters():
                yield parameter, one[name]


def equal_runs(*models: object) -> list[EqualRun]:
    """The runs of equal blocks in models that are long enough to leave blocks out."""
    found = []
    for model in models:
        if not isinstance(model, nn.Module):
            continue
        uses = _uses(model)
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        for name, module in lists:
            if any(name.startswith(f"{other}.") for other, _ in lists):
                continue
            found += _runs([(f"{name}.{index}", block) for index, block in module.named_children()], uses)
    return found


def _runs(blocks: Sequence[tuple[str, nn.Module]], uses: Mapping[int, int]) -> list[EqualRun]:
    kinds = [_kind(block, uses) for _, block in blocks]
    found, begin = [], 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or kinds[end] is None or kinds[end] != kinds[begin]:
            if kinds[begin] is not None and end - begin > FIRST + LAST:
                found.append(EqualRun(blocks[begin:end]))
            begin = end
    return found


def _uses(model: nn.Module) -> dict[int, int]:
    """How many places of a model hold each tensor, by id: a tied one stays in its block's kind by identity."""
    count: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            count[id(tensor)] = count.get(id(tensor), 0) + 1
    return count


def _kind(block: nn.Module, uses: Mapping[int, int]) -> tuple | None:
    """What the memory of a block depends on beside its arguments; None if it has hooks or is held twice."""
    found = []
    for name, module in block.named_modules():
        if "forward" in module.__dict__ or any(module.__dict__.get(hooks) for hooks in HOOKS):
            return None
        plain = [(key, _plain(value)) for key, value in sorted(module.__dict__.items())
                 if key not in HOOKS and key not in INSIDE and key != NUMBER]
        tensors = [(key, None if tensor is None else _tensor(tensor, uses))
                   for place in (module._parameters, module._buffers) for key, tensor in place.items()]
        found.append((name, type(module), tuple(plain), tuple(tensors), tuple(module._modules)))
    return tuple(found)


HOOKS = tuple(sorted(key for key in nn.Module().__dict__ if "hooks" in key))
INSIDE = {"_parameters", "_buffers", "_modules"}


def _plain(value: object) -> object:
    """A plain value by itself, anything else by identity: what two blocks share, such as their configuration."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_plain, value))
    if type(value) is partial:
        return partial, _plain(value.func), _plain(value.args), tuple(
            (name, _plain(one)) for name, one in sorted(value.keywords.items()))
    if isinstance(value, (dict, set, frozenset)) and not value:
        return type(value)
    return id(value)


def _tensor(tensor: torch.Tensor, uses: Mapping[int, int]) -> tuple:
    shared = id(tensor) if uses.get(id(tensor), 0) > 1 else None
    return (type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad,
            tensor.grad is None, tensor.untyped_storage().nbytes(), shared)


@contextmanager
def few_running(runs: Sequence[EqualRun], tracker: LiveBytes | None = None) -> Iterator[None]:
    """Within the context only some blocks of each run do run; others return what the block before them returned.

    Blocks lack their number, so that one that reads it fails, and the caller runs all of them.
    """
    numbered = [module for run in runs for _, block in run.blocks for module in block.modules()
                if NUMBER in module.__dict__]
    numbers = [module.__dict__.pop(NUMBER) for module in numbered]
    stage = _Stage(runs, tracker)
    try:
        with calling(stage.blocks, stage.instead):
            yield
    finally:
        for module, number in zip(numbered, numbers, strict=True):
            module.__dict__[NUMBER] = number


class _Stage:
    """Stands in for the blocks that do not run, and notes where the others begin."""

    def __init__(self, runs: Sequence[EqualRun], tracker: LiveBytes | None) -> None:
        self.tracker = tracker
        # Two models have blocks of the same names.
        self.of = {f"{number}:{name}": run for number, run in enumerate(runs) for name, _ in run.blocks}
        self.blocks = {f"{number}:{name}": block for number, run in enumerate(runs) for name, block in run.blocks}
        self.ran = {id(block) for run in runs for _, block in run.running}
        self.returned: dict[int, torch.Tensor] = {}  # by run: what its last block returned
        self.called: set[str] = set()

    def instead(self, name: str, module: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            if name in self.called:
                raise Uneven(f"{name} is called twice")
            self.called.add(name)
            run = self.of[name]
            if id(module) not in self.ran:
                return self.returned[id(run)]
            self.returned.pop(id(run), None)
            self._note(run.forward)
            out = own_forward(module, *args, **kwargs)
            if not isinstance(out, torch.Tensor):
                raise Uneven(f"{name} returns something else than a tensor")
            if self.tracker is not None and out.requires_grad:
                out.register_hook(lambda _: self._note(run.backward))
            if module is run.blocks[FIRST - 1][1]:
                self.returned[id(run)] = out
            return out
        return forward

    def _note(self, positions: list[int]) -> None:
        positions.append(0 if self.tracker is None else len(self.tracker.timeline))


@dataclass(frozen=True)
class Put:
    """Changes of the live bytes that are put `times` times at a position of the timeline, copied from `begin`."""

    at: int
    begin: int
    changes: tuple[int, ...]
    times: int


def puts(runs: Sequence[EqualRun], timeline: Sequence[int]) -> list[Put]:
    """What the blocks that did not run would have added to a timeline; raises Uneven if two that ran are different."""
    def changes(begin: int, end: int) -> tuple[int, ...]:
        return tuple(timeline[at] - timeline[at - 1] for at in range(begin, end))

    found = []
    for run in runs:
        if len(run.forward) not in (0, FIRST + LAST) or len(run.backward) not in (0, len(run.forward)):
            raise Uneven(f"not all blocks from {run.blocks[0][0]} on ran")
        # (begin of a block, of the next, and of the one after the blocks that are put between them)
        spots = [run.forward[FIRST - 2:FIRST + 1]] if run.forward else []
        spots += [run.backward[LAST - 1:LAST + 2]] if run.backward else []
        for first, second, third in spots:
            if changes(first, second) != changes(second, third):
                raise Uneven(f"blocks from {run.blocks[0][0]} on are not equal")
        times = len(run.counted)
        if run.forward:
            found.append(Put(spots[0][2], spots[0][1], changes(*spots[0][1:]), times))
        if run.backward:
            found.append(Put(spots[1][1], spots[1][0], changes(*spots[1][:2]), times))
    return sorted(found, key=lambda put: put.at)


def unfolded(timeline: Sequence[int], places: Sequence[Put]) -> list[int]:
    """A timeline with what the blocks that did not run would have added to it."""
    found, shift, done = [], 0, 0
    for put in places:
        found += [count + shift for count in timeline[done:put.at]]
        for _ in range(put.times):
            for change in put.changes:
                found.append(found[-1] + change)
        shift += put.times * sum(put.changes)
        done = put.at
    return found + [count + shift for count in timeline[done:]]


def moved(position: int, places: Sequence[Put]) -> int:
    """Where a position of the timeline is after `unfolded`."""
    return position + sum(put.times * len(put.changes) for put in places if put.at < position)


def repeated(notes: Sequence[tuple[int, int]], places: Sequence[Put]) -> list[tuple[int, int]]:
    """Notes (position, bytes) of gradients, and those of the blocks that did not run, at positions after `unfolded`."""
    found = [(moved(position, places), count) for position, count in notes]
    for put in places:
        inside = [(position - put.begin, count) for position, count in notes
                  if put.begin < position <= put.begin + len(put.changes)]
        start = moved(put.at, places)
        found += [(start + time * len(put.changes) + offset, count) for time in range(put.times)
                  for offset, count in inside]
    return found

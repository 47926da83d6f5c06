"""Segments: runs of blocks that keep only their first input, and are run forward again when the backward reaches them.

Like torch's non-reentrant checkpointing, through hooks on the tensors that autograd saves; but over several calls that
an unmodified model makes one after the other, and nested. Gradients flow through the first forward's graph alone, so
that hooks on parameters (DistributedDataParallel) fire once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.rematerialization.chain import Block, Schedule, Segment

SMALL = 8192  # bytes up to which a saved tensor stays: states of generators


@dataclass(frozen=True)
class Handle:
    """Stands in autograd's graph for a saved tensor that a segment dropped: the how-manieth it was."""

    frame: Frame
    index: int


@dataclass(frozen=True)
class Link:
    """Stands in recorded arguments for a tensor that the block before handed out: the how-manieth."""

    output: int


@dataclass
class Recorded:
    """One call of a block: what is needed to make it again."""

    run: Callable
    module: nn.Module
    arguments: list
    spec: object
    saved: range = range(0)  # numbers of the tensors that it saved and that were dropped


class Frame:
    """One pass over a segment: the calls made in it, and the saved tensors once they have been made again.

    Args:
        items: how the blocks of the segment run the next time.
        first: number of the first tensor saved in this pass.
    """

    def __init__(self, items: Schedule, first: int = 0) -> None:
        self.items = items
        self.first = first
        self.next = first
        self.calls: list[Recorded] = []
        self.values: dict[int, torch.Tensor | Handle] = {}
        self.kinds: dict[int, tuple] = {}
        self.passed: dict[int, int] = {}  # saved tensors that are an argument: which
        self.around = _Around()

    def run(self, call: Recorded, args: tuple, kwargs: dict) -> object:
        """Make a call of which nothing is kept but what is held elsewhere."""
        self.calls.append(call)
        held, given = self._held(call), [_same(leaf) for leaf in tree_flatten((args, kwargs))[0]]
        first = self.next

        def pack(tensor: torch.Tensor) -> torch.Tensor | Handle:
            if _storage(tensor) in held or tensor.untyped_storage().nbytes() <= SMALL:
                return tensor
            handle = Handle(self, self.next)
            self.kinds[self.next] = (tuple(tensor.shape), tensor.dtype)
            if _same(tensor) in given:
                self.passed[self.next] = given.index(_same(tensor))
            self.next += 1
            return handle

        with saved_tensors_hooks(pack, unpack):
            out = call.run(call.module, *args, **kwargs)
        call.saved = range(first, self.next)
        return out

    def _held(self, call: Recorded) -> set[int]:
        """Storages that stay whatever happens: parameters, and arguments from outside of the segment."""
        tensors = [*call.module.parameters(), *call.module.buffers(),
                   *[leaf for leaf in call.arguments if isinstance(leaf, torch.Tensor)]]
        return set(map(_storage, tensors))

    def get(self, index: int) -> torch.Tensor:
        """A tensor that was saved, made again with all others of the segment unless that has just been done.

        Raises:
            RuntimeError: the calls did not save the same tensors again.
        """
        if index not in self.values:
            self._again()
        value = self.values.pop(index)
        return value.frame.get(value.index) if isinstance(value, Handle) else value

    def _again(self) -> None:
        with self.around.restored(), torch.enable_grad():
            count = _Again(self).run()
        if count != self.next:
            raise RuntimeError(f"recomputing {self.calls[0].module.__class__.__name__} and what follows saved "
                               f"{count - self.first} tensors, the first time {self.next - self.first}: its forward "
                               "does not do the same twice")


class _Again:
    """The second forward over a segment: fills the frame's values, with frames of their own for segments inside."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.index = frame.first
        self.before: list[object] = []

    def run(self) -> int:
        calls = iter(self.frame.calls)
        for item in self.frame.items:
            if isinstance(item, Block):
                call = next(calls)
                if item is self.frame.items[-1] and all(index in self.frame.passed for index in call.saved):
                    self._pass_on(call)
                else:
                    self._block(call)
            else:
                self._segment(item, [next(calls) for _ in range(item.last - item.first)])
        return self.index

    def _pass_on(self, call: Recorded) -> None:
        """The last block saved nothing but what it was given: it need not run."""
        args, kwargs = self._arguments(call)
        leaves = tree_flatten((args, kwargs))[0]
        for index in call.saved:
            self.frame.values[index] = leaves[self.frame.passed[index]].detach()
        self.index = call.saved.stop

    def _block(self, call: Recorded) -> None:
        held = self.frame._held(call)

        def pack(tensor: torch.Tensor) -> None:
            if _storage(tensor) in held or tensor.untyped_storage().nbytes() <= SMALL:
                return
            self.frame.values[self._number(tensor)] = tensor.detach()

        args, kwargs = self._arguments(call)
        with saved_tensors_hooks(pack, unpack):
            self.before = _leaves(call.run(call.module, *args, **kwargs))

    def _segment(self, item: Segment, calls: Sequence[Recorded]) -> None:
        inner = Frame(item.inside, self.index)
        for position, call in enumerate(calls):
            first = position == 0
            args, kwargs = self._arguments(call)
            leaves = tree_flatten((args, kwargs))[0] if first else call.arguments
            self.before = _leaves(inner.run(Recorded(call.run, call.module, leaves, call.spec), args, kwargs))
        for index in range(self.index, inner.next):
            self.frame.values[index] = Handle(inner, index)
        self.index = inner.next

    def _number(self, tensor: torch.Tensor) -> int:
        index, self.index = self.index, self.index + 1
        if self.frame.kinds.get(index) != (tuple(tensor.shape), tensor.dtype):
            raise RuntimeError(f"recomputing saved a tensor of shape {tuple(tensor.shape)} where the first forward "
                               f"saved {self.frame.kinds.get(index)}: its forward does not do the same twice")
        return index

    def _arguments(self, call: Recorded) -> tuple[tuple, dict]:
        leaves = [self.before[leaf.output] if isinstance(leaf, Link) else leaf for leaf in call.arguments]
        leaves = [leaf.detach().requires_grad_(leaf.requires_grad)
                  if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) else leaf for leaf in leaves]
        return tree_unflatten(leaves, call.spec)


class Recorder:
    """Follows a model's own calls through one segment.

    Args:
        segment: the blocks and how they run again.
    """

    def __init__(self, segment: Segment) -> None:
        self.frame = Frame(segment.inside)
        self.before: dict[int, int] = {}
        self.handed: list[object] = []

    def call(self, run: Callable, module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Make the model's call, remembering what it was given; what the block before handed out, only by number."""
        leaves, spec = tree_flatten((args, kwargs))
        numbers = {id(leaf): number for number, leaf in enumerate(self.handed) if isinstance(leaf, torch.Tensor)}
        leaves = [Link(numbers[id(leaf)]) if isinstance(leaf, torch.Tensor) and id(leaf) in numbers else leaf
                  for leaf in leaves]
        out = self.frame.run(Recorded(run, module, leaves, spec), args, kwargs)
        self.handed = _leaves(out)
        return out


class _Around:
    """What a forward runs in besides its arguments: generators and autocast."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        kinds = ["cpu", *(["cuda"] if self.cuda is not None else [])]
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
                          torch.is_autocast_cache_enabled()) for kind in kinds]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Generators and autocast as they were then; generators go back afterwards."""
        devices = [torch.cuda.current_device()] if self.cuda is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            casts = [torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
                     for kind, enabled, dtype, cache in self.autocast]
            with casts[0], casts[1] if len(casts) > 1 else nullcontext():
                yield


def unpack(saved: torch.Tensor | Handle | None) -> torch.Tensor:
    """What autograd asks for when the backward needs a saved tensor."""
    return saved.frame.get(saved.index) if isinstance(saved, Handle) else saved


def _leaves(out: object) -> list[object]:
    return tree_flatten(out)[0]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: object) -> object:
    """Equal for tensors that are the same piece of memory in the same shape."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


"""Segments: runs of blocks that keep only their first input, and are run forward again when the backward reaches them.

Like torch's non-reentrant checkpointing, through hooks on the tensors that autograd saves; but over several calls that
an unmodified model makes one after the other, and nested. Gradients flow through the first forward's graph alone, so
that hooks on parameters (DistributedDataParallel) fire once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.rematerialization.chain import Block, Schedule, Segment
from strategies.rematerialization.regions import version

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
    outside: list[torch.Tensor]  # those of its arguments that the outermost segment was given from outside
    saved: range = range(0)  # numbers of the tensors that it saved and that were dropped
    versions: list = field(default_factory=list)  # of its arguments
    again: str = ""  # why it cannot be made again
    buffers: list = field(default_factory=list)  # (module, name, value before) of those that it updates


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
        leaves = tree_flatten((args, kwargs))[0]
        held, given, versions = self._held(call), list(map(_same, leaves)), list(map(version, leaves))
        call.versions = list(map(version, call.arguments))
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

        with saved_tensors_hooks(pack, unpack), _noting_buffers(call):
            out = call.run(call.module, *args, **kwargs)
        call.saved = range(first, self.next)
        if versions != list(map(version, leaves)):
            call.again = "it writes to a tensor that it is given"
        return out

    def _held(self, call: Recorded) -> set[int]:
        """Storages that stay whatever happens: parameters, and arguments from outside of the segment."""
        return set(map(_storage, [*call.module.parameters(), *call.module.buffers(), *call.outside]))

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
        with saved_tensors_hooks(pack, unpack), _old_buffers(call):
            self.before = _leaves(call.run(call.module, *args, **kwargs))

    def _segment(self, item: Segment, calls: Sequence[Recorded]) -> None:
        inner = Frame(item.inside, self.index)
        for position, call in enumerate(calls):
            first = position == 0
            args, kwargs = self._arguments(call)
            leaves = tree_flatten((args, kwargs))[0] if first else call.arguments
            with _old_buffers(call):
                again = Recorded(call.run, call.module, leaves, call.spec, call.outside)
                self.before = _leaves(inner.run(again, args, kwargs))
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
        reason = call.again
        if call.versions != list(map(version, call.arguments)):
            reason = reason or "a tensor that it was given has been written to since"
        if reason:
            raise RuntimeError(f"{type(call.module).__name__} cannot be recomputed: {reason}")
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
        self.out: list[object] = []
        self.handed: list[object] = []

    def call(self, run: Callable, module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Make the model's call, remembering what it was given; what the block before handed out, only by number."""
        leaves, spec = tree_flatten((args, kwargs))
        numbers = {kind: number for number, kind in enumerate(self.handed) if kind is not None}
        leaves = [Link(numbers[version(leaf)]) if version(leaf) in numbers else leaf for leaf in leaves]
        outside = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        out = self.frame.run(Recorded(run, module, leaves, spec, outside), args, kwargs)
        self.out = _leaves(out)  # held, so that no other tensor takes its place
        self.handed = [version(leaf) for leaf in self.out]
        return out


_updating: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # which buffers a module's forward changes


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module's buffers are: whose, and their names."""
    return [(part, name) for part in module.modules() for name, buffer in part._buffers.items() if buffer is not None]


@contextmanager
def _noting_buffers(call: Recorded) -> Iterator[None]:
    """Note the buffers that a call updates as they were before: so it is to find them when it is made again.

    All are copied the first time that a module is called here, afterwards only those that have changed.
    """
    places = _buffers(call.module)
    known = _updating.setdefault(call.module, set(range(len(places))))
    before = [part._buffers[name] for part, name in places]
    copies = {index: before[index].detach().clone() for index in known if index < len(before)}
    versions = list(map(version, before))
    yield
    changed = {index for index, (part, name) in enumerate(places) if version(part._buffers[name]) != versions[index]}
    if changed - set(copies):
        call.again = f"it updates the buffer {places[min(changed - set(copies))][1]}, which it did not before"
    _updating[call.module] = changed | (known if len(known) < len(places) else set())
    call.buffers = [(*places[index], copies[index]) for index in changed & set(copies)]


@contextmanager
def _old_buffers(call: Recorded) -> Iterator[None]:
    """Within the context a call finds the buffers that it updates as it found them the first time."""
    now = [part._buffers[name] for part, name, _ in call.buffers]
    for part, name, old in call.buffers:
        part._buffers[name] = old.clone()
    try:
        yield
    finally:
        for (part, name, _), buffer in zip(call.buffers, now, strict=True):
            part._buffers[name] = buffer


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


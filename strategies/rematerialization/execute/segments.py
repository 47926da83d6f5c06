"""Segments: runs of blocks that keep only their first input and are recomputed when the backward reaches them.

This works like torch's non-reentrant activation checkpointing, through saved-tensor hooks, but across several calls
that an unmodified model makes one after another, and nested. Gradients flow through the graph of the first forward
alone, so that hooks on parameters (DistributedDataParallel) fire once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.rematerialization.capture.compile_region import gpus_in_use, own_forward
from strategies.rematerialization.capture.regions import LEAVING, looks_at, version
from strategies.rematerialization.capture.rng_state import Generators, undisturbed
from strategies.rematerialization.capture.trial_run import attributes_kept
from strategies.rematerialization.solve.chain_program import Block, ChainSchedule, Segment

SMALL = 8192  # saved tensors of at most this many bytes are kept, such as RNG states


@dataclass(frozen=True)
class Handle:
    """Replaces, in autograd's graph, the saved tensor number `index` that a segment dropped."""

    frame: SegmentFrame
    index: int


@dataclass(frozen=True)
class Passed:
    """Replaces, in recorded arguments, a tensor that the previous block returned, or a view of it.

    Attributes:
        output: index of that output.
        view: size, stride and relative storage offset; None for the tensor itself.
    """

    output: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, handed: Sequence[object], versions: Sequence[object]) -> Passed | None:
        """How a tensor derives from the previous outputs, if it does and none has been written to since."""
        for number, other in enumerate(handed):
            if isinstance(other, torch.Tensor) and looks_at(tensor, other) and tensor._version == versions[number][1]:
                if tensor is other:
                    return cls(number)
                return cls(number, (tuple(tensor.shape), tensor.stride(),
                                    tensor.storage_offset() - other.storage_offset()))
        return None

    def again(self, handed: Sequence[object]) -> torch.Tensor:
        """The same derived from recomputed outputs."""
        tensor = handed[self.output]
        if self.view is None:
            return tensor
        size, stride, offset = self.view
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


@dataclass
class Recorded:
    """One call of a block, with what is needed to repeat it."""

    run: Callable
    module: nn.Module
    arguments: list
    spec: object
    outside: list[torch.Tensor]  # arguments from outside the outermost segment
    saved: range = range(0)  # numbers of its saved tensors that were dropped
    versions: list = field(default_factory=list)  # of its arguments
    again: str = ""  # why it cannot be repeated
    buffers: list = field(default_factory=list)  # (module, name, value before) of buffers that it updates
    generators: Generators | None = None  # RNG states before it, unless as after the previous call
    autocast: tuple = ()
    training: bool = True


class SegmentFrame:
    """One pass over a segment: the calls made in it, and the saved tensors once they have been recomputed.

    Args:
        items: how the blocks of the segment run the next time.
        first: number of the first tensor saved in this pass.
    """

    def __init__(self, items: ChainSchedule, first: int = 0) -> None:
        self.items = items
        self.first = first
        self.next = first
        self.calls: list[Recorded] = []
        self.values: dict[int, torch.Tensor | Handle] = {}
        self.kinds: dict[int, tuple] = {}
        self.passed: dict[int, int] = {}  # index of the argument that a saved tensor is
        self.ended: Generators | None = None

    def run(self, call: Recorded, args: tuple, kwargs: dict) -> object:
        """Make a call and drop what it saves, except what is held elsewhere."""
        self.calls.append(call)
        leaves = tree_flatten((args, kwargs))[0]
        held, given, versions = self._held(call), list(map(_same, leaves)), list(map(version, leaves))
        call.versions, call.training, call.autocast = list(map(version, call.arguments)), call.module.training, _casts()
        now = Generators.now()
        call.generators = None if now.equals(self.ended) else now
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

        with saved_tensors_hooks(pack, unpack), _noting_buffers(call), _cast_anew(call):
            out = call.run(call.module, *args, **kwargs)
        call.saved = range(first, self.next)
        if versions != list(map(version, leaves)):
            call.again = "it writes to a tensor that it is given"
        self.ended = Generators.now() if len(self.calls) < sum(_count(item) for item in self.items) else None
        return out

    def _held(self, call: Recorded) -> set[int]:
        """Storages that stay in any case: parameters, buffers, and arguments from outside the segment."""
        return set(map(_storage, [*call.module.parameters(), *call.module.buffers(), *call.outside]))

    def get(self, index: int) -> torch.Tensor:
        """A saved tensor, recomputed with all others of the segment unless that has just been done.

        Raises:
            RuntimeError: the recomputed calls did not save the same tensors.
        """
        if index not in self.values:
            self._again()
        value = self.values.pop(index)
        return value.frame.get(value.index) if isinstance(value, Handle) else value

    def _again(self) -> None:
        with undisturbed(), torch.enable_grad(), attributes_kept(
                {call.module for call in self.calls if call.module in LEAVING}):
            count = _Again(self).run()
        if count != self.next:
            raise RuntimeError(f"recomputing {self.calls[0].module.__class__.__name__} and what follows saved "
                               f"{count - self.first} tensors, the first time {self.next - self.first}: its forward "
                               "does not do the same twice")


class _Again:
    """The second forward over a segment: fills the frame's values, with nested frames for segments inside."""

    def __init__(self, frame: SegmentFrame) -> None:
        self.frame = frame
        self.index = frame.first
        self.before: list[object] = []

    def run(self) -> int:
        calls = list(self.frame.calls)  # fewer than planned if the model skipped blocks
        for item in self.frame.items:
            now, calls = calls[:_count(item)], calls[_count(item):]
            if now and isinstance(item, Segment):
                self._segment(item, now)
            elif now and not calls and all(index in self.frame.passed for index in now[0].saved):
                self._pass_on(now[0])
            elif now:
                self._block(now[0])
        return self.index

    def _pass_on(self, call: Recorded) -> None:
        """The last block saved nothing but its arguments, so it need not run."""
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
        with saved_tensors_hooks(pack, unpack), _as_then(call):
            self.before = _cut(call.run(call.module, *args, **kwargs))

    def _segment(self, item: Segment, calls: Sequence[Recorded]) -> None:
        inner = SegmentFrame(item.inside, self.index)
        for position, call in enumerate(calls):
            first = position == 0
            args, kwargs = self._arguments(call)
            leaves = tree_flatten((args, kwargs))[0] if first else call.arguments
            with _as_then(call):
                again = Recorded(call.run, call.module, leaves, call.spec, call.outside)
                self.before = _cut(inner.run(again, args, kwargs))
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
        if call.training != call.module.training:
            reason = reason or "it has been switched between training and evaluation since"
        if reason:
            raise RuntimeError(f"{type(call.module).__name__} cannot be recomputed: {reason}")
        leaves = [leaf.again(self.before) if isinstance(leaf, Passed) else leaf for leaf in call.arguments]
        return tree_unflatten(_cut(leaves), call.spec)


class Recorder:
    """Follows a model's own calls through one segment.

    Args:
        segment: the blocks and how they are recomputed.
    """

    def __init__(self, segment: Segment) -> None:
        self.frame = SegmentFrame(segment.inside)
        self.out: list[object] = []
        self.handed: list[object] = []

    def follows(self, args: tuple, kwargs: dict) -> bool:
        """Whether a call is given an output of the previous block; if not, another step has begun."""
        handed = {_storage(leaf) for leaf in self.out if isinstance(leaf, torch.Tensor)}
        return any(isinstance(leaf, torch.Tensor) and _storage(leaf) in handed for leaf in _leaves((args, kwargs)))

    def call(self, run: Callable, module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Make the model's call and record its arguments; those that the previous block returned, only by index."""
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [leaf if not isinstance(leaf, torch.Tensor) else Passed.of(leaf, self.out, self.handed) or leaf
                  for leaf in leaves]
        outside = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        out = self.frame.run(Recorded(run, module, leaves, spec, outside), args, kwargs)
        self.out = _leaves(out)  # kept alive, so that no other tensor takes its identity
        self.handed = [version(leaf) for leaf in self.out]
        return out


_updating: WeakKeyDictionary[nn.Module, dict[tuple, set[int]]] = WeakKeyDictionary()
"""Indices of the buffers that a module's forward changes, for each combination of training flags of its submodules."""


@contextmanager
def _noting_buffers(call: Recorded) -> Iterator[None]:
    """Note the old values of the buffers that a call updates, for when it is repeated.

    The first time, all buffers are copied and compared, because batch norm's kernels do not bump versions; afterwards
    only those that changed before.
    """
    places = [(part, name) for part in call.module.modules() for name, buffer in part._buffers.items()
              if buffer is not None]
    known = _updating.setdefault(call.module, {})
    key = (len(places), *(part.training for part, _ in places))
    before = [part._buffers[name] for part, name in places]
    copies = {index: before[index].detach().clone() for index in known.get(key, range(len(places)))}
    versions = list(map(version, before))
    yield
    after = [part._buffers[name] for part, name in places]
    changed = {index for index, buffer in enumerate(after) if version(buffer) != versions[index]
               or (key not in known and not torch.equal(buffer, copies[index]))}
    if changed - set(copies):
        call.again = f"it updates the buffer {places[min(changed - set(copies))][1]}, which it did not before"
    known[key] = changed | known.get(key, set())
    call.buffers = [(*places[index], copies[index]) for index in known[key] & set(copies)]


@contextmanager
def _as_then(call: Recorded) -> Iterator[None]:
    """RNG states, autocast and buffers as a call found them the first time; buffers are restored afterwards."""
    if call.generators is not None:
        call.generators.put_back()
    now = [part._buffers[name] for part, name, _ in call.buffers]
    for part, name, old in call.buffers:
        part._buffers[name] = old.clone()
    try:
        with ExitStack() as casts:
            for kind, enabled, dtype, cache in call.autocast:
                casts.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            casts.enter_context(_cast_anew(call))
            yield
    finally:
        for (part, name, _), buffer in zip(call.buffers, now, strict=True):
            part._buffers[name] = buffer


@contextmanager
def _cast_anew(call: Recorded) -> Iterator[None]:
    """Disable autocast's cache for modules that run unchanged: it would hold 16-bit weights until the step ends."""
    with ExitStack() as casts:
        for kind, enabled, dtype, cache in _casts():
            if enabled and cache and call.run is own_forward:
                casts.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield


def _casts() -> tuple:
    """Autocast settings for each kind of device, as arguments of torch.autocast."""
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
                  torch.is_autocast_cache_enabled()) for kind in ["cpu", *(["cuda"] if gpus_in_use() else [])])


def _count(item: Block | Segment) -> int:
    return 1 if isinstance(item, Block) else item.last - item.first


def unpack(saved: torch.Tensor | Handle | None) -> torch.Tensor:
    """Unpack hook: autograd calls it when the backward needs a saved tensor."""
    return saved.frame.get(saved.index) if isinstance(saved, Handle) else saved


def _leaves(out: object) -> list[object]:
    return tree_flatten(out)[0]


def _cut(out: object) -> list[object]:
    """Leaves, with tensors detached from what made them.

    A recomputed forward is done once its saved tensors have been seen. Its graph would hold the arguments and the
    hooks, which in turn hold the graph: a reference cycle that would never be freed.
    """
    return [leaf.detach().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) else leaf for leaf in _leaves(out)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: object) -> object:
    """A key that is equal for tensors with the same memory, shape, strides and dtype."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


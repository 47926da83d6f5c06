"""Track the live bytes of tensor storages, operation by operation, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# These return the storage of an argument that was created without an operation, as in torch.tensor([1, 2]).
_ADOPTS = {aten.lift_fresh.default, aten.lift.default}
# With these, autograd writes gradients into zeros: normally in place, but out of place under a dispatch mode
# (`areAnyTensorSubclassLike` in torch/csrc/autograd/FunctionsManual.cpp).
_INTO_ZEROS = {aten.scatter_add.default, aten.scatter.src, aten.index_add.default, aten.index_put.default}

ENTERED: list[LiveBytes] = []
"""The trackers that are currently entered, which `mark` notifies."""


class _Death(weakref.ref):
    """A weak reference that remembers key and size of its storage after that is freed."""

    __slots__ = ("key", "bytes")


class _Sum(NamedTuple):
    """A sum of two gradients that autograd has just computed.

    Attributes:
        first: key of the first one's storage.
        bytes: of the sum.
        at: number of timeline entries before it.
        peak: the peak before it.
    """

    first: int
    bytes: int
    at: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages created while this context is entered, until their last reference dies.

        with FakeTensorMode(), LiveBytes() as tracker:
            model = build()
            tracker.mark("forward")
            model(ids).sum().backward()
        tracker.peak

    A storage counts once, however many views it has. The order of this context and a FakeTensorMode does not matter:
    torch dispatches to FakeTensorMode last. Tensors that existed before count only after they are passed to `watch`.

    When autograd accumulates several gradients, it adds in place if it holds the only reference. In this context it
    allocates a new tensor instead (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`). So if the first
    term of a sum is freed right after the sum, with no allocation in between, it is counted as an addition in place.

    Not counted: memory that a kernel allocates internally (`workspace` adds it), tensors created without an operation
    (`torch.from_numpy`, the 8 bytes of a Python number that autograd saves, the 5 kB of random state that each
    activation checkpoint saves on CPU), and allocations inside a higher-order operator. Functions compiled by
    torch.compile run eagerly in this context, and are counted that way; `flex_attention`, which insists on compiling,
    refuses to run.

    Attributes:
        current: live bytes now.
        peak: most bytes that were live at once.
        timeline: live bytes after each allocation and each free, in order, while the context is entered.
        marks: (name, number of entries the timeline had when `mark` was called).
        unknown: operations whose `workspace` could not be found.

    Args:
        round_to: each storage is rounded up to a multiple of this many bytes; the CUDA allocator uses 512.
        device: count only tensors on this type of device, such as "cuda"; None for all.
        workspace: called as `workspace(operation, args, kwargs)` after each operation; returns the bytes that were
            briefly live in addition to the outputs, or None if unknown.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        round_to: int = 1,
        device: str | None = None,
        workspace: Callable[[Any, tuple, dict], int | None] | None = None,
    ) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.timeline: list[int] = []
        self.marks: list[tuple[str, int]] = []
        self.unknown: set[Any] = set()
        self._round_to = round_to
        self._device = device
        self._workspace = workspace
        self._live: dict[int, _Death] = {}
        self._when_dead = self._died  # a single bound method for all storages
        self._resizes: list[Callable] = []
        self._sum: _Sum | None = None

    def __enter__(self) -> LiveBytes:
        if not self._resizes:
            ENTERED.append(self)
        self._resizes.append(torch.UntypedStorage.resize_)
        torch.UntypedStorage.resize_ = _resize_and_tell(self, self._resizes[-1])  # not dispatched as an operation
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resizes.pop()
        if not self._resizes:
            ENTERED.remove(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in types:
            if hasattr(kind, "__tensor_flatten__"):
                return NotImplemented  # a wrapper subclass: its operations on inner tensors come here next
        self._sum, before = None, (len(self.timeline), self.peak)
        result = func(*args, **kwargs) if kwargs else func(*args)
        self._see(result, func, args, kwargs)
        if func is aten.add.Tensor or func in _INTO_ZEROS:
            self._sum = self._gradients_summed(result, func, args, *before)
        if self._workspace is not None:
            self._add_workspace(func, args, kwargs or {})
        return result

    @property
    def _entered(self) -> bool:
        return bool(self._resizes)

    # ---- called by the user

    def watch(self, *things: Any) -> None:
        """Also count existing storages: those of tensors, modules, optimizers, and containers of them."""
        for tensor in tensors_of(*things):
            for part in strided_parts(tensor):
                if self._counts(part) and part.untyped_storage()._cdata not in self._live:
                    self._born(part.untyped_storage())

    def mark(self, name: str) -> None:
        """Record a name at the current position of the timeline."""
        self.marks.append((name, len(self.timeline)))

    def allocate(self, count: int) -> None:
        """Add bytes manually, for work that is not run; `release` removes them."""
        self._change(self._rounded(count))

    def release(self, count: int) -> None:
        """Remove bytes that `allocate` added.

        Raises:
            ValueError: fewer bytes than that are live.
        """
        if self._rounded(count) > self.current:
            raise ValueError(f"release of {count} bytes where {self.current} are live")
        self._change(-self._rounded(count))

    def transient(self, count: int) -> None:
        """Record bytes that were briefly live in addition to the current ones."""
        if count > 0:
            self.allocate(count)
            self.release(count)

    # ---- automatic tracking

    def _gradients_summed(self, result: Any, func: Any, args: tuple, at: int, peak: int) -> _Sum | None:
        """The sum in `result` if autograd could have added in place: no graph is recorded, the first term is dense."""
        first, others = args[0], [one for one in args[1:] if isinstance(one, (torch.Tensor, list))]
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not self._entered:
            return None
        if not others or first.layout is not torch.strided or (
                func is aten.index_put.default and args[3:4] != (True,)):  # which sums; else a gradient is cleared
            return None
        storage = first.untyped_storage()
        made = self._live.get(result.untyped_storage()._cdata)
        known = self._live.get(storage._cdata)
        if known is None or made is None or not made.bytes == known.bytes > 0 or storage.nbytes() != first.nbytes:
            return None
        return _Sum(storage._cdata, made.bytes, at, peak)

    def _see(self, result: Any, func: Any, args: tuple, kwargs: dict | None) -> None:
        if isinstance(result, torch.Tensor):
            if result.layout is torch.strided and not hasattr(type(result), "__tensor_flatten__"):
                self._see_storage(result, func, args, kwargs)
            else:
                self._see(list(strided_parts(result)), func, args, kwargs)
        elif isinstance(result, (list, tuple)):
            for part in result:
                self._see(part, func, args, kwargs)
        elif isinstance(result, dict):
            self._see(list(result.values()), func, args, kwargs)

    def _see_storage(self, tensor: torch.Tensor, func: Any, args: tuple, kwargs: dict | None) -> None:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            if known.bytes != self._rounded(storage.nbytes()):
                self._resized(storage)
        elif self._counts(tensor) and (func in _ADOPTS or not _is_argument(storage._cdata, args, kwargs)):
            self._born(storage)

    def _counts(self, tensor: torch.Tensor) -> bool:
        return self._device is None or tensor.device.type == self._device

    def _born(self, storage: torch.UntypedStorage) -> None:
        death = _Death(storage, self._when_dead)
        death.key = storage._cdata
        death.bytes = self._rounded(storage.nbytes())
        self._live[death.key] = death
        self._change(death.bytes, timed=self._entered)

    def _died(self, death: _Death) -> None:
        del self._live[death.key]
        if self._sum is not None and death.key == self._sum.first and torch._C._current_graph_task_id() != -1:
            self._in_place(self._sum)
            return
        self._change(-death.bytes, timed=self._entered)  # after exit, the timeline does not change any more

    def _in_place(self, made: _Sum) -> None:
        """Rewrite the record of a sum whose first term was freed, as an addition in place."""
        self.timeline[made.at:] = [count - made.bytes for count in self.timeline[made.at + 1:]]
        self.current -= made.bytes
        self.peak, self._sum = made.peak, None

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Track a resize, during which old and new memory briefly coexist."""
        death = self._live.get(storage._cdata)
        if death is None:
            return
        before, death.bytes = death.bytes, self._rounded(storage.nbytes())
        if death.bytes != before:
            self._change(death.bytes)
            self._change(-before)

    def _change(self, count: int, timed: bool = True) -> None:
        self.current += count
        if count > 0:
            self._sum = None
        if timed and count:
            self.timeline.append(self.current)
        if self.current > self.peak:
            self.peak = self.current

    def _rounded(self, count: int) -> int:
        return -(-count // self._round_to) * self._round_to

    def _add_workspace(self, func: Any, args: tuple, kwargs: dict) -> None:
        found = self._workspace(func, args, kwargs)
        if found is None:
            self.unknown.add(func)
        else:
            self.transient(found)


def tensors_of(*things: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors reachable from modules, optimizers, tensors, and containers of these, some more than once.

    From modules these are parameters, buffers and gradients, from optimizers their state, from tensors also their
    gradients.
    """
    for thing in things:
        if isinstance(thing, torch.Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
        elif isinstance(thing, nn.Module):
            yield from tensors_of(*thing.parameters(), *thing.buffers())
        elif isinstance(thing, torch.optim.Optimizer):
            yield from tensors_of(thing.state)
        elif isinstance(thing, Mapping):
            yield from tensors_of(*thing.values())
        elif isinstance(thing, Iterable) and not isinstance(thing, (str, bytes)):
            yield from tensors_of(*thing)


def strided_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with storages that a tensor consists of: itself, unless it is sparse or a wrapper subclass."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:  # a DTensor lists its mesh among them
            if isinstance(part := getattr(tensor, name), torch.Tensor):
                yield from strided_parts(part)
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())


def _is_argument(key: int, args: tuple, kwargs: dict | None) -> bool:
    """Whether a storage belongs to an argument, so that it is not new, only not watched."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided and value.untyped_storage()._cdata == key:
                return True
        elif isinstance(value, (list, tuple)) and _is_argument(key, tuple(value), None):
            return True
    return False


def _resize_and_tell(tracker: LiveBytes, resize: Callable) -> Callable:
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tracker._resized(storage)
        return result
    return resize_

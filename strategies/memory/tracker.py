"""Live bytes of tensor storages, counted operation by operation, on real tensors or on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# These hand on the storage of an argument that was made without any operation, as torch.tensor([1, 2]) does.
_ADOPTS = {aten.lift_fresh.default, aten.lift.default}
# By these autograd puts gradients into zeros: in place by itself, out of place while anything watches its operations
# (`areAnyTensorSubclassLike` in torch/csrc/autograd/FunctionsManual.cpp).
_INTO_ZEROS = {aten.scatter_add.default, aten.scatter.src, aten.index_add.default, aten.index_put.default}

ENTERED: list[LiveBytes] = []
"""What counts at present, to be told of marks."""


class _Death(weakref.ref):
    """A weak reference that still knows which storage it was when the storage is gone."""

    __slots__ = ("key", "bytes")


class _Sum(NamedTuple):
    """A sum of two gradients that autograd has just made.

    Attributes:
        first: key of the storage of the first of them.
        bytes: of the sum.
        at: entries that the timeline had before it.
        peak: the peak before it.
    """

    first: int
    bytes: int
    at: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while this context is entered, until their last reference dies.

        with FakeTensorMode(), LiveBytes() as tracker:
            model = build()
            tracker.mark("forward")
            model(ids).sum().backward()
        tracker.peak

    A storage counts once, however many views it has. Under FakeTensorMode the order of the two contexts does not
    matter: torch asks FakeTensorMode last. Tensors from before count only once `watch` has been told of them.

    Where gradients meet, autograd adds to the one that it holds if nobody else does; but in this context it makes a
    third (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`). A sum whose first term ends with nothing in
    between is therefore counted as if it had been made in that term's place.

    Not seen: what a kernel allocates inside itself (`workspace` adds it), tensors made without an operation
    (`torch.from_numpy`, the 8 bytes of a Python number that autograd keeps, the 5 kB of random state that each
    activation checkpoint keeps on CPU), and what a higher-order operator does inside. Functions that torch.compile made
    run eagerly in this context, and are counted so; `flex_attention`, which insists on compiling, refuses to run.

    Attributes:
        current: live bytes now.
        peak: the most bytes that were live at once.
        timeline: live bytes after each allocation and each free, in order, while the context is entered.
        marks: (name, number of entries the timeline had when `mark` was called).
        unknown: operations whose `workspace` could not be found.

    Args:
        round_to: bytes to whose next multiple each storage is rounded up; 512 is what the CUDA allocator does.
        device: count only tensors on this type of device ("cuda"), or all of them.
        workspace: called as `workspace(operation, args, kwargs)` after each operation; the bytes that it returns were
            live for a moment on top of the outputs. None means that they are not known.
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
        self._when_dead = self._died  # one bound method for all storages, not one for each
        self._resizes: list[Callable] = []
        self._sum: _Sum | None = None

    def __enter__(self) -> LiveBytes:
        if not self._resizes:
            ENTERED.append(self)
        self._resizes.append(torch.UntypedStorage.resize_)
        torch.UntypedStorage.resize_ = _resize_and_tell(self, self._resizes[-1])  # no operation tells of this one
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
                return NotImplemented  # a tensor made of tensors: its own operations on them come here next
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

    # ---- told by the caller

    def watch(self, *things: Any) -> None:
        """Count storages that exist already: tensors, modules, optimizers, and containers of them."""
        for tensor in tensors_of(*things):
            for part in strided_parts(tensor):
                if self._counts(part) and part.untyped_storage()._cdata not in self._live:
                    self._born(part.untyped_storage())

    def mark(self, name: str) -> None:
        """Remember a name at the present position of the timeline."""
        self.marks.append((name, len(self.timeline)))

    def allocate(self, count: int) -> None:
        """Add bytes by hand, for work that is not run; `release` takes them away."""
        self._change(self._rounded(count))

    def release(self, count: int) -> None:
        """Take away bytes that `allocate` added.

        Raises:
            ValueError: fewer bytes than that are live.
        """
        if self._rounded(count) > self.current:
            raise ValueError(f"release of {count} bytes where {self.current} are live")
        self._change(-self._rounded(count))

    def transient(self, count: int) -> None:
        """Note bytes that were live for a moment on top of the present ones."""
        if count > 0:
            self.allocate(count)
            self.release(count)

    # ---- seen by itself

    def _gradients_summed(self, result: Any, func: Any, args: tuple, at: int, peak: int) -> _Sum | None:
        """What `args` are if autograd may add to the first: while no graph is made, first one dense."""
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
        self._change(-death.bytes, timed=self._entered)  # a finished timeline does not grow when its model is dropped

    def _in_place(self, made: _Sum) -> None:
        """Forget that a sum was made beside its first term, which has ended."""
        self.timeline[made.at:] = [count - made.bytes for count in self.timeline[made.at + 1:]]
        self.current -= made.bytes
        self.peak, self._sum = made.peak, None

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that grows has, for a moment, both its old and its new memory."""
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
    """Tensors that are reachable from modules (parameters, buffers, gradients), optimizers (their state), plain tensors
    (with their gradients) and containers of all these; one may come more than once."""
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
    """The tensors with a storage of their own that a tensor is made of: itself, unless it is sparse or a wrapper."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:  # a DTensor names its mesh among them
            if isinstance(part := getattr(tensor, name), torch.Tensor):
                yield from strided_parts(part)
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())


def _is_argument(key: int, args: tuple, kwargs: dict | None) -> bool:
    """Whether a storage is that of an argument: then it is not new, only not watched."""
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

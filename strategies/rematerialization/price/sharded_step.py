"""A sharded model's training step on fake tensors: the bytes that a rank gathers, reduces and frees as it runs."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from strategies.memory.residency import Bucket, ModuleTraffic, Residency
from strategies.memory.tracker import LiveBytes

GATHERED, BUFFERS, GRADIENTS = "gathered weights", "communication", "gradients"


class Shared:
    """Tells a tracker what a rank gathers, reduces and keeps while the step of the whole model runs on fake tensors.

    Args:
        model: the whole model, of fake tensors; its weights are not counted by the tracker.
        residency: what a rank holds instead.
        tracker: an entered `LiveBytes`.
    """

    def __init__(self, model: nn.Module, residency: Residency, tracker: LiveBytes) -> None:
        self.model, self.residency, self.tracker = model, residency, tracker
        self.now: Counter[str] = Counter()  # bytes by name added since the step began
        self._seen: list[tuple[int, dict[str, int]]] = []  # the same, by position on the tracker's timeline
        self._handles: list[Any] = []
        self._turned = self._grown = False
        self._bucket = Bucket(residency.bucket)
        self._pending = self._turning = self._trailing = self._lasting = 0
        self._open: ModuleTraffic | None = None  # whose backward is running

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context for forward and backward."""
        with ExitStack() as stack:
            stack.callback(self._remove)
            for turn in self.residency.turns:
                self._follow(turn)
            if self.residency.at_once or self.residency.backward:
                self._handles += [parameter.register_post_accumulate_grad_hook(self._into_bucket)
                                  for parameter in self.model.parameters() if parameter.requires_grad]
            self._change(GATHERED, self.residency.teacher)
            self._moment(GATHERED, self.residency.asking)
            self._handles.append(self.model.register_forward_pre_hook(self._asked))
            self._follow_head()
            yield
            if self._open is not None:
                self._after(self._open)  # an embedding's input gets no gradient
            self._change(BUFFERS, -self._trailing)
            self._moment(BUFFERS, self.residency.end)
            self._drop(self.model.parameters())
            self._change(GRADIENTS, self.residency.rest - self._pending)
            self._change(GATHERED, -self.residency.forward - self._lasting)
            self._change(BUFFERS, -self.residency.backward if self._turned else 0)

    def at(self, position: int) -> dict[str, int]:
        """Bytes by name that had been added when the timeline had this length."""
        index = bisect_right(self._seen, position, key=lambda seen: seen[0])
        return {name: count for name, count in self._seen[index - 1][1].items() if count} if index else {}

    def _asked(self, *_: Any) -> None:
        """The teacher has run; the student begins."""
        self._change(GATHERED, self.residency.forward - self.residency.teacher)

    def _follow_head(self) -> None:
        """Account for what is resident while the student's head runs and the loss is computed in it."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        beside = self.residency.head + self.residency.landed
        if head is None or not beside:
            return

        def turn(gradient: torch.Tensor) -> None:
            self._moment(GATHERED, self.residency.turning + self.residency.turned)
            self._change(GATHERED, self.residency.turning)
            self._turning = self.residency.turning

        def before(*_: Any) -> None:
            self._change(GATHERED, beside)
            self._moment(GATHERED, self.residency.head)  # the teacher's arrives in its own buffer

        self._handles.append(head.register_forward_pre_hook(before))
        def after(module: nn.Module, args: tuple, out: object) -> None:
            self._change(GATHERED, -beside)
            self._when_back(out, turn)

        self._handles.append(head.register_forward_hook(after))

    def _follow(self, turn: ModuleTraffic) -> None:
        modules = [self.model.get_submodule(name) for name in turn.modules]

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._moment(GATHERED, turn.arriving + turn.forward)
            self._change(GATHERED, turn.forward)
            given = [leaf for leaf in tree_flatten((args, kwargs))[0]
                     if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if given:  # their gradients come last
                given[0].register_hook(lambda gradient: self._after(turn))

        def after(module: nn.Module, args: tuple, out: object) -> None:
            if not turn.stays:
                self._change(GATHERED, -turn.forward)
            self._when_back(out, lambda gradient: self._backward(turn))

        self._handles.append(modules[0].register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(modules[-1].register_forward_hook(after))

    def _when_back(self, out: object, then: Callable[[torch.Tensor], None]) -> None:
        """Call `then` when the backward reaches what made `out`."""
        made = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if made:
            made[0].register_hook(then)

    def _backward(self, turn: ModuleTraffic) -> None:
        if self._open is not None:  # its input is this one's output, whose hooks run in this order
            self._after(self._open)
        self._open = turn
        self._change(GATHERED, -self._turning)
        self._turning = 0
        self._change(GATHERED, turn.backward - (turn.forward if turn.stays else 0))
        self._change(BUFFERS, turn.buffers)
        self._moment(GATHERED, turn.fetched)

    def _after(self, turn: ModuleTraffic) -> None:
        if self._open is not turn:
            return
        self._open = None
        self._moment(BUFFERS, turn.reduced)
        if turn.lasts:
            self._lasting += turn.backward
        else:
            self._change(GATHERED, -turn.backward)
        self._change(BUFFERS, -turn.buffers)
        if turn.drops:
            modules = map(self.model.get_submodule, turn.modules)
            self._drop([parameter for module in modules for parameter in module.parameters()])
        self._change(GRADIENTS, turn.pending - self._pending + turn.kept)
        self._pending = turn.pending
        if turn is self.residency.turns[0] and self.residency.trailing:
            self._trailing = self.residency.trailing
            self._change(BUFFERS, self._trailing)

    def _into_bucket(self, parameter: nn.Parameter) -> None:
        """A gradient has been made; it goes into the bucket, now or at the end."""
        if not self._turned:
            self._turned = True
            self._change(BUFFERS, self.residency.backward)
        if not self.residency.at_once:
            return
        if self.residency.bucket:
            waiting = self._bucket.content
            summed = self._bucket.add(parameter.numel())
            if summed:
                self._moment(BUFFERS, self.residency.emptied * waiting)
            if summed and not self._grown:
                self._grown = True
                self._change(GRADIENTS, self.residency.grown)
        parameter.grad = None

    def _drop(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _change(self, name: str, count: int) -> None:
        self.now[name] += count
        self.tracker.allocate(count) if count > 0 else self.tracker.release(-count)
        self._seen.append((len(self.tracker.timeline), dict(self.now)))

    def _moment(self, name: str, count: int) -> None:
        """Count bytes that are resident only for a moment."""
        if count > 0:
            self._change(name, count)
            self._change(name, -count)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

"""What everything but the regions holds over one step, moment by moment, found on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from strategies.memory.meter import resident_tensors
from strategies.memory.tracker import LiveBytes
from strategies.rematerialization.execute import own_forward
from strategies.rematerialization.regions import Call, Meta, calling, takes_part, without_cache


@dataclass(frozen=True)
class Frame:
    """Bytes that are live beside the regions, in a step in which regions keep nothing.

    Attributes:
        base: before the step: weights, optimizer state, teacher, batch, gradients if there are any.
        start: most until the first region's forward.
        before: for every region, when its forward runs, its input left out.
        head: most between the last region's forward and its backward, its output included.
        behind: for every region, when its backward runs, gradients that arrive left out.
        arriving: for every region, bytes of these gradients.
        end: most after the first region's backward.
        update: most while the optimizer steps.
        parts: bytes of `base` by name.
        timeline: bytes after every change, regions standing still.
        marks: (phase, position in the timeline).
    """

    base: int
    start: int
    before: tuple[int, ...]
    head: int
    behind: tuple[int, ...]
    arriving: tuple[int, ...]
    end: int
    update: int
    parts: dict[str, int]
    timeline: tuple[int, ...] = ()
    marks: tuple[tuple[str, int], ...] = ()


@contextmanager
def without_data(*models: nn.Module) -> Iterator[tuple[FakeTensorMode, dict[int, torch.Tensor]]]:
    """Within the context, the models' parameters and buffers are tensors without data; tied ones stay tied.

    Yields:
        the mode in which such tensors live, and for every real parameter (by id) the one that stands for it.
    """
    tensors = [tensor for model in models for tensor in [*model.parameters(), *model.buffers()]]
    own = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    mode = own or FakeTensorMode(allow_non_fake_inputs=True)
    stand_in: dict[int, torch.Tensor] = {}
    swapped: list[tuple[dict, str, torch.Tensor]] = []
    try:
        for place in [place for model in models for module in model.modules()
                      for place in (module._parameters, module._buffers)]:
            for name, tensor in place.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in stand_in:
                    stand_in[id(tensor)] = _without_data(mode, tensor)
                swapped.append((place, name, tensor))
                place[name] = stand_in[id(tensor)]
        yield mode, stand_in
    finally:
        for place, name, tensor in swapped:
            place[name] = tensor


def _without_data(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def observe(calls: Sequence[Call], mode: FakeTensorMode, loss: Callable[[], torch.Tensor], parts: dict[str, list],
            update: Callable[[], object], round_to: int = 1, reserved: Mapping[str, int] | None = None) -> Frame:
    """Run one step on tensors without data, with regions that only hand out what they would.

    Args:
        calls: the regions in the order they are called.
        mode: where the tensors live.
        loss: runs the forward and gives the loss.
        parts: what is there before the step by name: tensors, modules, optimizers.
        update: takes the optimizer's step and drops the gradients.
        round_to: see LiveBytes.
        reserved: bytes by name that are held besides.
    """
    with mode, Answers(), LiveBytes(round_to=round_to) as tracker:
        counted = {}
        for name, things in parts.items():
            before = tracker.current
            tracker.watch(*things)
            counted[name] = tracker.current - before
        for name, count in (reserved or {}).items():
            tracker.allocate(count)
            counted[name] = count
        stage = _Stage(tracker, calls)
        with calling({call.name: call.module for call in calls}, stage.instead):
            base = tracker.current
            tracker.mark("forward")
            found = loss()
            tracker.mark("backward")
            found.backward()
            del found
        tracker.mark("update")
        update()
        tracker.mark("end")
    return stage.frame(base, counted)


class Answers(TorchDispatchMode):
    """Tensors without data answer those who ask for a number: 1; so that `print(loss.item())` stops no plan."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Stage:
    """Stands in for the regions and notes where on the timeline each runs."""

    def __init__(self, tracker: LiveBytes, calls: Sequence[Call]) -> None:
        self.tracker = tracker
        self.calls = calls
        self.at: dict[tuple[str, int], tuple[int, int]] = {}  # (phase, region): timeline at entry and exit
        self.arriving: dict[int, int] = {}
        self.count = 0

    def instead(self, name: str, module: nn.Module) -> Callable:
        def forward(*args, **kwargs):
            if not takes_part(module, args, kwargs):
                return own_forward(module, *args, **kwargs)
            args, kwargs = without_cache(args, kwargs)
            index = self.count
            self.count += 1
            call = self.calls[index]
            leaves = tree_flatten((args, kwargs))[0]
            given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            weights = [weight for weight in module.parameters() if weight.requires_grad]
            specs, tree = call.outputs
            shared = [leaf for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
                      and number not in call.passed]
            made = _StandIn.apply(self, index, shared, *given, *weights)
            tensors = iter(made)
            return tree_unflatten([next(tensors) if isinstance(spec, Meta) else spec for spec in specs], tree)
        return forward

    def enter(self, phase: str, index: int) -> None:
        self.at[phase, index] = (len(self.tracker.timeline), 0)

    def leave(self, phase: str, index: int) -> None:
        self.at[phase, index] = (self.at[phase, index][0], len(self.tracker.timeline))

    def frame(self, base: int, parts: dict[str, int]) -> Frame:
        """The frame of the step that has run."""
        marks = dict(self.tracker.marks)
        count = len(self.calls)

        def at(position: int) -> int:
            return self.tracker.timeline[position - 1] if position else base

        def most(start: int, stop: int) -> int:
            return max([at(stop), *self.tracker.timeline[start:stop]])

        steps = tuple(self.tracker.timeline), tuple(self.tracker.marks[:3])
        update = most(marks["update"], marks["end"])
        if not count:  # everything is the head
            return Frame(base, base, (), most(marks["forward"], marks["update"]), (), (), at(marks["update"]), update,
                         parts, *steps)
        forward = [self.at["forward", index] for index in range(count)]
        backward = [self.at["backward", index] for index in range(count)]
        before = [most(forward[index - 1][1] if index else forward[0][0], forward[index][0]) - self.calls[index].input
                  for index in range(count)]
        behind = [most(backward[index + 1][1] if index < count - 1 else backward[index][0], backward[index][0])
                  - self.arriving[index] for index in range(count)]
        return Frame(
            base=base, start=max(base, most(marks["forward"], forward[0][0])), before=tuple(before),
            head=max(at(forward[-1][1]), most(forward[-1][1], backward[-1][0])), behind=tuple(behind),
            arriving=tuple(self.arriving[index] for index in range(count)),
            end=max(at(backward[0][1]), most(backward[0][1], marks["update"])),
            update=update, parts=parts, timeline=steps[0], marks=steps[1])


class _StandIn(torch.autograd.Function):
    """Hands out tensors as a region would, and gradients as its backward would.

    It keeps nothing but what is passed to all regions alike: masks and the like, which cost the first of them only.
    """

    @staticmethod
    def forward(ctx, stage: _Stage, index: int, shared: list[torch.Tensor], *given: torch.Tensor):
        stage.enter("forward", index)
        ctx.stage, ctx.index, ctx.shared = stage, index, shared
        ctx.kinds = [Meta.of(tensor) if tensor.requires_grad else None for tensor in given]
        specs = [spec for spec in stage.calls[index].outputs[0] if isinstance(spec, Meta)]
        made = tuple(spec.empty() for spec in specs)
        ctx.mark_non_differentiable(*[tensor for tensor, spec in zip(made, specs, strict=True)
                                      if not spec.requires_grad])
        ctx.set_materialize_grads(False)
        stage.leave("forward", index)
        return made

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None):
        stage = ctx.stage
        stage.enter("backward", ctx.index)
        stage.arriving[ctx.index] = resident_tensors([gradient for gradient in gradients if gradient is not None])
        made = tuple(None if kind is None else kind.empty() for kind in ctx.kinds)
        stage.leave("backward", ctx.index)
        ctx.shared = None
        return None, None, None, *made


def fake_batch(mode: FakeTensorMode, batch: object) -> object:
    """A batch of tensors without data like the one given."""
    with mode:
        known: dict[int, torch.Tensor] = {}

        def like(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, FakeTensor) and id(tensor) not in known:
                known[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                                        device=tensor.device)
            return known.get(id(tensor), tensor)

        return tree_map_only(torch.Tensor, like, batch)

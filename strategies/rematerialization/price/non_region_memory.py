"""Memory held outside the regions over one training step, moment by moment, found on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.memory.meter import resident_tensors
from strategies.memory.residency import Residency
from strategies.memory.tracker import LiveBytes
from strategies.memory.workspace import product_workspace
from strategies.rematerialization.capture.call_arguments import takes_part, without_cache
from strategies.rematerialization.capture.compile_region import own_forward
from strategies.rematerialization.capture.fake_tensors import FakeItemMode
from strategies.rematerialization.capture.regions import Meta, RegionCall, calling
from strategies.rematerialization.capture.trial_run import attributes_kept
from strategies.rematerialization.price.equal_blocks import (
    EqualRun,
    Uneven,
    few_running,
    moved,
    puts,
    repeated,
    unfolded,
)
from strategies.rematerialization.price.sharded_step import Shared


@dataclass(frozen=True)
class NonRegionMemory:
    """Bytes that are live beside the regions, in a step in which regions themselves keep nothing.

    Attributes:
        base: before the step: weights, optimizer state, teacher, batch, gradients if there are any.
        start: peak until the first region's forward.
        before: for every region, during its forward, excluding its input.
        head: peak between the last region's forward and its backward, its output included.
        behind: for every region, during its backward, excluding the incoming gradients, which are read.
        arriving: for every region, bytes of these gradients.
        fresh: for every region, bytes of its arguments that no earlier region was given or returned.
        spare: bytes of regions' arguments that are counted until their backward although it may not read them.
        end: peak after the first region's backward.
        update: peak during the optimizer step.
        parts: bytes of `base` by name.
        timeline: bytes after every change, without the regions' own.
        marks: (phase, position in the timeline).
        around: the timeline before the first region's forward, between the last one's forward and its backward, after
            the first one's backward, and during the optimizer step.
        turn: number of changes in the second of these before the backward starts.
        loss: the same before the loss is computed, if that is marked.
        exchanged: if ranks share the model, bytes by name that have been added since the step began, for each moment:
            (name, number of the region or -1).
        drops: whether gradients are freed as soon as they are made.
        gradients: (number of changes in the timeline before it is complete, bytes) of each parameter's gradient, in a
            step of one rank.
    """

    base: int
    start: int
    before: tuple[int, ...]
    head: int
    behind: tuple[int, ...]
    arriving: tuple[int, ...]
    fresh: tuple[int, ...]
    spare: int
    end: int
    update: int
    parts: dict[str, int]
    timeline: tuple[int, ...] = ()
    marks: tuple[tuple[str, int], ...] = ()
    around: tuple[tuple[int, ...], ...] = ()
    turn: int = 0
    loss: int | None = None
    exchanged: Mapping[tuple[str, int], Mapping[str, int]] = field(default_factory=dict)
    drops: bool = False
    gradients: tuple[tuple[int, int], ...] = ()

    def peak_of_whole_step(self) -> tuple[str, int]:
        """When the peak occurs in a step without regions, and the bytes of gradients that it has made by then.

        At the end of the backward at most one gradient is missing: often the embedding's, tied to the head, whose two
        terms are both there then.
        """
        phases = [(name, position) for name, position in self.marks if name != "end"]
        begin = phases[0][1] if phases else 0
        peak = max(range(begin, len(self.timeline)), key=lambda position: self.timeline[position], default=begin)
        phase = next((name for name, position in reversed(phases) if position <= peak), "forward")
        missing = sum(position > peak for position, _ in self.gradients)
        if phase == "backward" and self.gradients and missing <= 1:
            phase = "end"
        made = 0 if self.drops else sum(count for position, count in self.gradients if position <= peak)
        return phase, made


class Unreached(Exception):
    """No gradient flows back to some regions.

    Attributes:
        regions: which, by number.
    """

    def __init__(self, regions: Sequence[int]) -> None:
        self.regions = frozenset(regions)
        super().__init__(f"no gradient reaches regions {sorted(regions)}")


def observe(calls: Sequence[RegionCall], mode: FakeTensorMode, loss: Callable[[], torch.Tensor], parts: dict[str, list],
            update: Callable[[], object], round_to: int = 1, reserved: Mapping[str, int] | None = None,
            shared: tuple[nn.Module, Residency] | None = None, idle: frozenset[int] = frozenset(),
            trained: Sequence[torch.Tensor] = (), runs: Sequence[EqualRun] = ()) -> NonRegionMemory:
    """Run one step on fake tensors, with stand-ins for regions that only return outputs of the right shapes.

    Args:
        calls: the regions in call order.
        mode: mode in which the fake tensors live.
        loss: runs the forward and returns the loss.
        parts: what exists before the step by name: tensors, modules, optimizers.
        update: runs the optimizer step and frees the gradients.
        round_to: see LiveBytes.
        reserved: bytes by name that are held by something else.
        shared: the model that is sharded over ranks, and what this rank holds of it.
        idle: parameters, by id, that get no gradient.
        trained: parameters whose gradients are noted when they are complete.
        runs: runs of equal blocks, of which only some are to run; only without regions and on one rank.

    Raises:
        Unreached: some regions have no backward.
        Uneven: the blocks of a run are not equal.
    """
    modules = {call.name: call.module for call in calls}
    with attributes_kept(modules.values()), mode, FakeItemMode(), LiveBytes(
            round_to=round_to, workspace=product_workspace) as tracker:
        counted = {}
        for name, things in parts.items():
            before = tracker.current
            tracker.watch(*things)
            counted[name] = tracker.current - before
        for name, count in (reserved or {}).items():
            tracker.allocate(count)
            counted[name] = counted.get(name, 0) + count
        stage = _Stage(tracker, calls, idle)
        sharing = None if shared is None else Shared(*shared, tracker)
        with calling(modules, stage.instead), nullcontext() if sharing is None else sharing.step(), \
                _completed(trained, tracker) as gradients, few_running(runs, tracker) if runs else nullcontext():
            base = tracker.current
            tracker.mark("forward")
            found = loss()
            tracker.mark("backward")
            found.backward()
            del found
        if runs:
            _unfold(tracker, runs, gradients)
        tracker.mark("update")
        tracker.transient(0 if shared is None else shared[1].update)
        update()
        tracker.mark("end")
    frame = replace(stage.frame(base, counted, shared is not None), gradients=tuple(gradients))
    return frame if sharing is None else replace(frame, exchanged=stage.exchanged(sharing))


@contextmanager
def _completed(trained: Sequence[torch.Tensor], tracker: LiveBytes) -> Iterator[list[tuple[int, int]]]:
    """Notes (position in the timeline, bytes) of each gradient as soon as autograd has summed it."""
    found: list[tuple[int, int]] = []
    handles = [parameter.register_post_accumulate_grad_hook(
        lambda one: found.append((len(tracker.timeline), one.nbytes))) for parameter in trained]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _unfold(tracker: LiveBytes, runs: Sequence[EqualRun], gradients: list[tuple[int, int]]) -> None:
    """Add what blocks that did not run would have added to a tracker's timeline, and give them their gradients.

    Raises:
        Uneven: the bytes that are live then are others than those of all gradients that there are.
    """
    places, length = puts(runs, tracker.timeline), len(tracker.timeline)
    for run in runs:
        for parameter, one in run.stands_for():
            if parameter.grad is None and one.grad is not None:
                parameter.grad = torch.empty_like(parameter)
    whole = unfolded(tracker.timeline[:length], places)
    if whole[-1] != tracker.current:
        raise Uneven(f"{whole[-1]} bytes after the backward, and {tracker.current} with all gradients")
    gradients[:] = repeated(gradients, places)
    tracker.timeline[:] = whole
    tracker.marks[:] = [(name, moved(position, places)) for name, position in tracker.marks]


class _Stage:
    """Stands in for the regions and notes where on the timeline each runs."""

    def __init__(self, tracker: LiveBytes, calls: Sequence[RegionCall], idle: frozenset[int] = frozenset()) -> None:
        self.idle = idle
        self.tracker = tracker
        self.calls = calls
        self.at: dict[tuple[str, int], tuple[int, int]] = {}  # (phase, region): timeline at entry and exit
        self.arriving: dict[int, int] = {}
        self.fresh = [0] * len(calls)
        self.arguments: dict[int, tuple[int, bool]] = {}  # by storage: bytes, whether a backward reads it
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
            weights = self.weights(module)
            specs, tree = call.outputs
            shared = {number: leaf for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
                      and number not in call.passed}
            self.note(index, shared)
            made = iter(_StandIn.apply(self, index, list(shared.values()), *given, *weights))
            out = [next(made) if isinstance(spec, Meta) else spec for spec in specs]
            for part, attribute, _ in call.attributes:
                part.__dict__[attribute] = next(made)
            return tree_unflatten(out, tree)
        return forward

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters for which a region's backward makes gradients."""
        return [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in self.idle]

    def note(self, index: int, shared: Mapping[int, torch.Tensor]) -> None:
        """Note arguments of a region, by index; they are held until its backward."""
        for number, tensor in shared.items():
            storage = tensor.untyped_storage()
            if storage._cdata not in self.arguments:
                self.fresh[index] += storage.nbytes()
            known = self.arguments.get(storage._cdata, (0, False))[1]
            self.arguments[storage._cdata] = storage.nbytes(), known or number in self.calls[index].read

    def enter(self, phase: str, index: int) -> None:
        self.at[phase, index] = (len(self.tracker.timeline), 0)

    def leave(self, phase: str, index: int) -> None:
        self.at[phase, index] = (self.at[phase, index][0], len(self.tracker.timeline))

    def exchanged(self, sharing: Shared) -> dict[tuple[str, int], dict[str, int]]:
        """What ranks had exchanged at each moment of the step."""
        marks, timeline = dict(self.tracker.marks), self.tracker.timeline

        def most(start: int, stop: int) -> dict[str, int]:
            return sharing.at(1 + max(range(start, max(stop, start + 1)), key=lambda position: timeline[position]))

        found = {(phase, index): sharing.at(entry) for (phase, index), (entry, _) in self.at.items()}
        if not self.at:
            return {("head", -1): most(marks["forward"], marks["update"])}
        first, last = 0, len(self.calls) - 1
        found["head", -1] = most(self.at["forward", last][1], self.at["backward", last][0])
        found["start", -1] = most(marks["forward"], self.at["forward", first][0])
        found["end", -1] = found["update", -1] = most(self.at["backward", first][1], marks["update"])
        return found

    def frame(self, base: int, parts: dict[str, int], exchanged: bool = False) -> NonRegionMemory:
        """The result of the step; `exchanged` says whether ranks exchange weights and gradients in it."""
        marks = dict(self.tracker.marks)
        count = len(self.calls)

        def at(position: int) -> int:
            return self.tracker.timeline[position - 1] if position else base

        def most(start: int, stop: int) -> int:
            return max([at(stop), *self.tracker.timeline[start:stop]])

        steps = tuple(self.tracker.timeline), tuple(mark for mark in self.tracker.marks if mark[0] != "end")
        update = most(marks["update"], marks["end"])
        if not count:  # everything is the head
            return NonRegionMemory(
                base,
                base,
                (),
                most(marks["forward"], marks["update"]),
                (),
                (),
                (),
                0,
                at(marks["update"]),
                update,
                parts,
                *steps,
            )
        unreached = [index for index in range(count) if ("backward", index) not in self.at]
        if unreached:
            raise Unreached(unreached)
        forward = [self.at["forward", index] for index in range(count)]
        backward = [self.at["backward", index] for index in range(count)]
        def beside(start: int, stop: int, least: int) -> int:
            """Bytes beside a region that runs at `stop` and that itself adds at least `least`.

            If ranks exchange weights and gradients just before, more is resident for a moment than while it runs.
            """
            return max(at(stop), most(start, stop) - least) if exchanged else most(start, stop)

        weights = [sum(weight.nbytes for weight in self.weights(call.module)) for call in self.calls]
        before = [beside(forward[index - 1][1] if index else forward[0][0], forward[index][0], self.calls[index].input)
                  - self.calls[index].input for index in range(count)]
        behind = [beside(backward[index + 1][1] if index < count - 1 else backward[index][0], backward[index][0],
                         weights[index]) - self.arriving[index] for index in range(count)]
        pieces = [(marks["forward"], forward[0][0]), (forward[-1][1], backward[-1][0]),
                  (backward[0][1], marks["update"]), (marks["update"], marks["end"])]
        return NonRegionMemory(
            base=base, start=max(base, most(marks["forward"], forward[0][0])), before=tuple(before),
            head=max(at(forward[-1][1]), most(forward[-1][1], backward[-1][0])), behind=tuple(behind),
            arriving=tuple(self.arriving[index] for index in range(count)), fresh=tuple(self.fresh),
            spare=sum(count for count, read in self.arguments.values() if not read),
            end=max(at(backward[0][1]), most(backward[0][1], marks["update"])),
            update=update, parts=parts, timeline=steps[0], marks=steps[1],
            around=tuple(tuple(self.tracker.timeline[begin:stop]) for begin, stop in pieces),
            turn=marks["backward"] - forward[-1][1],
            loss=marks["loss"] - forward[-1][1] if "loss" in marks else None)


class _StandIn(torch.autograd.Function):
    """Returns tensors as a region would, and gradients as its backward would.

    It keeps only arguments that all regions share, such as masks, which count for the first region alone.
    """

    @staticmethod
    def forward(ctx, stage: _Stage, index: int, shared: list[torch.Tensor], *given: torch.Tensor):
        stage.enter("forward", index)
        ctx.stage, ctx.index, ctx.shared = stage, index, shared
        ctx.kinds = [Meta.of(tensor) if tensor.requires_grad else None for tensor in given]
        call = stage.calls[index]
        specs = [*(spec for spec in call.outputs[0] if isinstance(spec, Meta)), *(spec for *_, spec in call.attributes)]
        made = tuple(spec.empty() for spec in specs)
        ctx.strides = [spec.stride for spec in specs]
        ctx.mark_non_differentiable(*[tensor for tensor, spec in zip(made, specs, strict=True)
                                      if not spec.requires_grad])
        ctx.set_materialize_grads(False)
        stage.leave("forward", index)
        return made

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None):
        stage = ctx.stage
        stage.enter("backward", ctx.index)
        # A gradient whose strides differ from the output's is copied by the region's backward, and stays beside it.
        stage.arriving[ctx.index] = resident_tensors([gradient for gradient, stride in zip(
            gradients, ctx.strides, strict=True) if gradient is not None and gradient.stride() == stride])
        made = tuple(None if kind is None else kind.empty() for kind in ctx.kinds)
        stage.leave("backward", ctx.index)
        ctx.shared = None
        return None, None, None, *made

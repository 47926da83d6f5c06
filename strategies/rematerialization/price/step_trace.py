"""Trace a training step on fake tensors: its parts, its optimizer, and fallbacks for models that fail on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from strategies.memory.meter import CUDA_BLOCK
from strategies.memory.residency import Residency
from strategies.memory.tracker import tensors_of
from strategies.rematerialization.capture.compile_region import quiet
from strategies.rematerialization.capture.fake_tensors import FakeItemMode, fake_optimizer, unwrapped
from strategies.rematerialization.capture.regions import RegionCall, first_line
from strategies.rematerialization.price.equal_blocks import EqualRun, equal_runs, few_running
from strategies.rematerialization.price.non_region_memory import NonRegionMemory, Unreached, observe


class Hooks(Protocol):
    """Makes an optimizer step during the backward."""

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        """Attach hooks to its parameters; the returned handle can `remove` them."""


class CannotPlan(RuntimeError):
    """Nothing can be predicted for a model, because it does not run on fake tensors."""


class Forward(Protocol):
    """A model, a batch and the loss of a batch, on fake tensors."""

    model: nn.Module
    batch: object
    loss: Callable[[object], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """A training step on fake tensors.

    Attributes:
        model, batch: of fake tensors.
        loss: computes the loss of a batch.
        optimizer: the real optimizer; None if there is none.
        stand_in: fake parameters by id of the real ones.
        others: modules and tensors that stay beside the model.
        accumulate: whether gradients of earlier micro-batches exist when a step begins.
        reserved: bytes by name that are held by something else.
        on_gpu: whether bytes are rounded as a GPU's allocator does.
        residency: what a rank holds of the model instead of all of it; None if it is not sharded.
        in_backward: attaches hooks to the optimizer's parameters that step and free gradients during the backward.
        idle: trained parameters, by id, that the loss does not depend on. What their forward keeps is kept all the
            same, but they get no gradient and no optimizer state.
        alike: whether equal blocks are used alike, so that a few of them tell what all need: nothing but the next block
            reads what one returns.
    """

    model: nn.Module
    batch: object
    loss: Callable[[object], torch.Tensor]
    optimizer: torch.optim.Optimizer | None
    stand_in: Mapping[int, torch.Tensor]
    others: Sequence[object]
    accumulate: bool
    reserved: Mapping[str, int]
    on_gpu: bool
    residency: Residency | None = None
    in_backward: Hooks | None = None
    idle: frozenset[int] = frozenset()
    alike: bool = False

    @cached_property
    def runs(self) -> list[EqualRun]:
        """Runs of equal blocks of the model and of those beside it, of which a few tell what all need."""
        return equal_runs(self.model, *self.others) if self.alike and self.residency is None else []

    def frame(self, calls: Sequence[RegionCall], mode: FakeTensorMode, shared: Shared) -> NonRegionMemory:
        """Run the step and return the memory held outside the regions; see `observe` for what it raises."""
        if self.residency is not None:
            return self._shared(calls, mode, self.residency)
        if self.runs and not calls and shared.even is not False:
            shared.even = False
            with suppress(Exception):  # then the step says itself, with all blocks, what is wrong with it
                frame = self._alone(calls, mode, shared, self.runs)
                shared.even = True
                return frame
        return self._alone(calls, mode, shared)

    def _alone(self, calls: Sequence[RegionCall], mode: FakeTensorMode, shared: Shared,
               runs: Sequence[EqualRun] = ()) -> NonRegionMemory:
        """The same on a rank that shares the model with no other; of `runs`, a few blocks run."""
        stepped = shared.optimizer  # of an earlier study of the same parameters: it has its state
        optimizer = stepped or (None if self.optimizer is None else fake_optimizer(self.optimizer, self.stand_in))
        modules = [self.model, *(thing for thing in self.others if isinstance(thing, nn.Module))]
        parameters = [parameter for parameter in parameters_of(modules, optimizer)
                      if parameter.requires_grad and id(parameter) not in self.idle]
        with mode:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            few = self.runs if shared.brief and getattr(optimizer, "one_by_one", False) else ()
            with _few_stepped(few, optimizer):
                state, update = ([stepped.state], stepped.step) if stepped else self._updating(optimizer, parameters)
            if optimizer is not None and not self.stand_in and self.in_backward is None and state and (
                    state[0] is optimizer.state):
                shared.optimizer = optimizer
            if not self.accumulate:
                for parameter in parameters:
                    parameter.grad = None
        parts = {"gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
                 "weights": [self.model.parameters(), self.model.buffers()],
                 "optimizer state": state, "others": list(self.others), "batch": [self.batch]}

        hooks = None
        if self.in_backward is not None and optimizer is not None:
            hooks, update = self.in_backward(optimizer), lambda: None

        def advance() -> None:
            with _few_stepped(few, None):
                update()
            for parameter in parameters:
                parameter.grad = None

        try:
            frame = observe(calls, mode, lambda: self.loss(self.batch), parts, advance,
                            CUDA_BLOCK if self.on_gpu else 1, self.reserved, idle=self.idle, trained=parameters,
                            runs=[EqualRun(run.blocks) for run in runs])
        finally:
            if hooks is not None:
                hooks.remove()
        return frame if hooks is None else replace(frame, drops=True)

    def _shared(self, calls: Sequence[RegionCall], mode: FakeTensorMode, residency: Residency) -> NonRegionMemory:
        """The same on a rank; the optimizer's state is part of what the rank holds."""
        def drop() -> None:
            for parameter in self.model.parameters():
                parameter.grad = None

        drop()
        return observe(calls, mode, lambda: self.loss(self.batch), {"batch": [self.batch]}, drop,
                       CUDA_BLOCK if self.on_gpu else 1, {**residency.parts, **self.reserved},
                       (self.model, residency))

    def _updating(self, optimizer: torch.optim.Optimizer | None, parameters: Sequence[torch.Tensor]
                  ) -> tuple[list[object], Callable[[], object]]:
        """The optimizer's state after a step, and a function that takes another step."""
        if optimizer is None:
            return [], lambda: None
        try:
            with FakeItemMode():
                optimizer.step()
        except Exception as error:  # third-party optimizers may need real values
            real = list(tensors_of(unwrapped(self.optimizer)))
            guess = [torch.empty(2 * parameter.numel()) for parameter in parameters]
            what = "its state is counted as it is" if real else "its state is taken for two fp32 numbers a parameter"
            warnings.warn(f"{type(optimizer).__name__} cannot take a step on tensors without data, so {what}, and its "
                          f"temporaries not at all: {first_line(error)}", stacklevel=6)
            return real or guess, lambda: None
        return [optimizer.state], optimizer.step


@contextmanager
def _few_stepped(runs: Sequence[EqualRun], optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Within the context only parameters of blocks that run have gradients, so that no others are stepped.

    An optimizer that steps tensors `one_by_one` peaks at one of these. Afterwards the others have a state as well, that
    of `optimizer` if it is new.
    """
    stood_for = [pair for run in runs for pair in run.stands_for()]
    gradients = [parameter.grad for parameter, _ in stood_for]
    for parameter, _ in stood_for:
        parameter.grad = None
    try:
        yield
    finally:
        for (parameter, _), gradient in zip(stood_for, gradients, strict=True):
            parameter.grad = gradient
    if optimizer is not None:
        for parameter, one in stood_for:
            if parameter not in optimizer.state and one in optimizer.state:
                optimizer.state[parameter] = tree_map_only(torch.Tensor, torch.empty_like, optimizer.state[one])


@dataclass
class Shared:
    """What several studies of one model's step have in common, found by the first that needs it.

    Attributes:
        calls: captured regions in call order; None until they have been captured.
        idle: names of the parameters in `Step.idle`; None until they are known.
        optimizer: the optimizer on fake parameters, after a step; None until one was taken, or where parameters have
            data and get new stand-ins in each study.
        even: whether equal blocks were found to need the same memory, change for change; None until it is known.
        brief: whether only peaks are asked for, and not what there is at each moment of the optimizer's step.
    """

    calls: list[RegionCall] | None = None
    idle: frozenset[str] | None = None
    optimizer: torch.optim.Optimizer | None = None
    even: bool | None = None
    brief: bool = False

    def of(self, step: Step, mode: FakeTensorMode) -> frozenset[int]:
        """The parameters in `Step.idle`, by id."""
        named = dict(step.model.named_parameters())
        if self.idle is None:
            idle = unreached(step, mode)
            self.idle = frozenset(name for name, parameter in named.items() if id(parameter) in idle)
        return frozenset(id(named[name]) for name in self.idle)


def trace_step(calls: list[RegionCall], step: Step, mode: FakeTensorMode, shared: Shared
               ) -> tuple[list[RegionCall], NonRegionMemory]:
    """The memory held outside the regions in a step, and the regions that take part in it.

    Regions that no gradient flows back to run unchanged. So do all regions, with a warning, if the model fails with
    stand-ins for them.

    Raises:
        CannotPlan: the model does not run on fake tensors at all.
    """
    step = replace(step, idle=shared.of(step, mode))
    while True:
        try:
            with quiet("torch._subclasses.fake_tensor"):
                return calls, step.frame(calls, mode, shared)
        except Unreached as error:
            calls = without({id(calls[index].module) for index in error.regions}, calls)
        except Exception as error:
            if not calls and isinstance(error, ValueError):  # the caller's mistake, with its own message
                raise
            if not calls:
                raise CannotPlan(f"{type(step.model).__name__} cannot be planned: a step of it cannot be tried on "
                                 f"tensors without data ({type(error).__name__}: {first_line(error)})") from error
            warnings.warn(f"{type(step.model).__name__} runs as it is, nothing of it is planned: it does not run "
                          f"with its blocks replaced ({type(error).__name__}: {first_line(error)})", stacklevel=4)
            calls = []


def unreached(step: Step, mode: FakeTensorMode) -> frozenset[int]:
    """Trained parameters, by id, that the loss does not depend on: they get no gradient and no optimizer state.

    Empty if the forward does not run on fake tensors, which the caller then finds out by itself.
    """
    if step.runs:
        with suppress(Exception):
            return off_the_path(step, mode, [EqualRun(run.blocks) for run in step.runs])
    try:
        return off_the_path(step, mode)
    except Exception:
        return frozenset()


def off_the_path(step: Forward, mode: FakeTensorMode, runs: Sequence[EqualRun] = ()) -> frozenset[int]:
    """Trained parameters, by id, that the loss does not depend on, according to the autograd graph.

    Of `runs`, a few blocks run. Raises what the forward raises. A decoder trained without its encoder has such
    parameters, the cross-attention's.
    """
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    with mode, FakeItemMode(), quiet("torch._subclasses.fake_tensor"), few_running(runs) if runs else nullcontext():
        todo = [step.loss(step.batch).grad_fn]
    seen, reached = set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            todo += [following for following, _ in node.next_functions]
    for run in runs:
        reached |= {id(parameter) for parameter, one in run.stands_for() if id(one) in reached}
    return frozenset(map(id, trained)) - reached


def without(modules: Collection[int], calls: Sequence[RegionCall]) -> list[RegionCall]:
    """The calls of all other modules than those given by id; what these returned no longer counts as chained."""
    for before, call in zip(calls, calls[1:], strict=False):
        call.chained = call.chained and id(before.module) not in modules
    return [call for call in calls if id(call.module) not in modules]


def parameters_of(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """All parameters of modules, and further ones of an optimizer, each once."""
    groups = [] if optimizer is None else optimizer.param_groups
    found = [*(parameter for module in modules for parameter in module.parameters()),
             *(parameter for group in groups for parameter in group["params"])]
    return list({id(parameter): parameter for parameter in found}.values())


@contextmanager
def gradients_kept(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Restore the gradients of all parameters afterwards."""
    before = [(parameter, parameter.grad) for parameter in parameters_of(modules, optimizer)]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient

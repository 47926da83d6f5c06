"""Choose whether a plan's schedules run through Inductor: only where compiling pays within the first steps.

What compiling can save is predicted first: the time of operations that can be fused, and of calling them one by one. If
even that is less than compiling takes, nothing is compiled. Otherwise one block is compiled and timed both ways.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from strategies.rematerialization.capture.joint_graph import Captured
from strategies.rematerialization.capture.regions import Meta, RegionCall, first_line
from strategies.rematerialization.capture.trial_run import attributes_kept, turned_back, undisturbed
from strategies.rematerialization.execute.installed import Planned
from strategies.rematerialization.planner import Planner
from strategies.rematerialization.price.costs import Prices, flops
from strategies.rematerialization.recompute_plan import RecomputePlan
from strategies.rematerialization.solve.chain_program import Option, leaves

STEPS = 50  # within which compiling has to pay
ROUNDS = 5
SLACK = 3.0  # operations timed alone, with warm caches, take up to this much less time than in a model
INSTALL = "install one (g++ or clang++; CXX names another)"  # the way out where a compiler is missing
COMPILING = {"cpu": 0.05, "cuda": 0.02}  # least seconds for each operation of a graph, on one core


@dataclass(frozen=True)
class Choice:
    """Whether Inductor runs a plan's schedules, and why."""

    inductor: bool
    why: str

    def __str__(self) -> str:
        return f"{'Inductor' if self.inductor else 'eager kernels'}: {self.why}"


def missing_compiler(kind: str) -> str | None:
    """What Inductor lacks to compile for a kind of device, "cpu" or "cuda"; None if nothing."""
    if kind == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports much

    try:
        get_cpp_compiler()
    except Exception as error:  # of several kinds, by platform
        return f"there is no C++ compiler at hand ({first_line(error)})"
    return None


class Ways:
    """A plan's two ways to run in a model, with Inductor and without; what one of them has compiled is kept.

    Args:
        planner: made the plan.
        plan: the plan.
        model: the model of the planned shapes to install it in; None for the planned one.
    """

    def __init__(self, planner: Planner, plan: RecomputePlan, model: nn.Module | None = None) -> None:
        self.planner, self.plan, self.model = planner, plan, model
        self._made: dict[bool, Planned] = {}

    def install(self, inductor: bool) -> Planned:
        """Install the plan one way or the other."""
        if inductor not in self._made:
            self.planner.install(self.plan, inductor, self.model)
            assert self.plan.planned is not None
            self._made[inductor] = self.plan.planned
        self.plan.planned = self._made[inductor]
        self.plan.planned.install()
        return self.plan.planned

    def choose(self, kind: str, micro_batches: int = 1,
               around: Callable[[], AbstractContextManager] = nullcontext) -> Choice:
        """Choose between the two, and say why; `install` the choice afterwards.

        Args:
            kind: the model's device, "cpu" or "cuda".
            micro_batches: forwards and backwards of a step.
            around: context of the forward, such as autocast.
        """
        ran = self._ran()
        if not ran:
            return Choice(False, "no block runs by a graph, so there is nothing to compile")
        lacking = missing_compiler(kind)
        if lacking is not None:
            return Choice(False, lacking)
        prices = self.planner.prices
        saved = STEPS * micro_batches * sum(_fusible_seconds(self.plan.calls[one].captured, prices) for one, _ in ran)
        least = COMPILING[kind] * sum({id(option): len(option.order) for _, option in ran}.values())
        if saved <= least:
            return Choice(False, f"compiling takes {least:.1f} s at least, and {STEPS} steps could save {saved:.1f} s "
                                 "at most")
        try:
            gain, compiling = self._tried(ran, kind, around)
        except Exception as error:  # of torch.compile, or of a block that does not run on made-up values
            return Choice(False, f"a block could not be compiled and timed: {first_line(error)}")
        return decided(gain * micro_batches, compiling)

    def _ran(self) -> list[tuple[int, Option]]:
        """Positions and options of the blocks that run by a graph."""
        options = [(position, self.plan.links[position].options[which]) for item in self.plan.schedule
                   for position, which in leaves(item)]
        return [(position, option) for position, option in options if option.order]

    def _tried(self, ran: Sequence[tuple[int, Option]], kind: str, around: Callable[[], AbstractContextManager]
               ) -> tuple[float, float]:
        """Seconds that all blocks save in a micro-batch and seconds of compiling all, from the most frequent option."""
        frequent = Counter(id(option) for _, option in ran).most_common(1)[0][0]
        position, option = next(one for one in ran if id(one[1]) == frequent)
        ways = {inductor: self.install(inductor) for inductor in (False, True)}
        module = ways[True].modules[position]

        def turn(inductor: bool) -> float:
            began = _now(kind)
            with around():
                out = ways[inductor].run_alone(position, *given)
            turned_back(module, tree_flatten(given)[0], out)
            return _now(kind) - began

        with undisturbed([module]), attributes_kept([module]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a failure, which is told as the reason
            given = made_up(self.plan.calls[position], next(module.parameters()).device)
            turn(False)
            first = turn(True)
            if ways[True].given_up:
                raise RuntimeError(f"torch.compile failed: {ways[True].given_up[0]}")
            taken = [(turn(False), turn(True)) for _ in range(ROUNDS)]
        eager, fused = (statistics.median(one[way] for one in taken) for way in (0, 1))
        called, compiled = (sum(counts) / len(option.order) for counts in (
            [len(one.order) for _, one in ran], {id(one): len(one.order) for _, one in ran}.values()))
        return (eager - fused) * called, (first - fused) * compiled


def decided(gain: float, compiling: float) -> Choice:
    """The choice, given seconds that Inductor saves in a step, and seconds of compiling everything."""
    if gain <= 0:
        return Choice(False, f"Inductor makes a step {-gain:.3f} s slower")
    after = compiling / gain
    return Choice(after <= STEPS, f"Inductor saves {gain:.3f} s a step and takes {compiling:.1f} s to compile, which "
                                  f"{'has paid' if after <= STEPS else 'would only pay'} after {after:,.0f} steps")


def _fusible_seconds(captured: Captured, prices: Prices) -> float:
    """The most that Inductor can save in a call: operations that it may fuse, and the calls of the others."""
    seconds = prices.price(captured)[0]
    own = sum(float(seconds[index]) for index, node in enumerate(captured.operations)
              if not flops(node) and "scaled_dot_product" not in str(node.target))
    return SLACK * (own + prices.device.overhead * len(captured.operations))


def made_up(call: RegionCall, device: torch.device) -> tuple[tuple, dict]:
    """Arguments of a region's shapes: random floating-point numbers, zeros, and masks that let everything through."""
    def value(leaf: object) -> object:
        if not isinstance(leaf, Meta):
            return leaf
        sizes = [1 if not stride else size for size, stride in zip(leaf.shape, leaf.stride, strict=True)]  # expanded
        tensor = torch.empty_strided(sizes, leaf.stride, dtype=leaf.dtype, device=device)
        if leaf.dtype.is_floating_point:
            return tensor.normal_().expand(leaf.shape).requires_grad_(leaf.requires_grad)
        return tensor.fill_(leaf.dtype is torch.bool).expand(leaf.shape)

    found, spec = call.arguments
    args, kwargs = tree_unflatten([value(leaf) for leaf in found], spec)
    return args, kwargs


def _now(kind: str) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

"""The planner: prices the captured regions of a training step and solves for a recompute plan for any memory budget.

Each region has a list of options (what it keeps and recomputes), found once. The regions in call order, with their
options, are the links of a chain; a plan picks an option for every link and may recompute whole runs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from torch import nn

from strategies.common.progress import tracked
from strategies.rematerialization.capture.joint_graph import Captured, problem
from strategies.rematerialization.capture.regions import RegionCall
from strategies.rematerialization.execute.installed import Planned, whole
from strategies.rematerialization.price.block_options import (
    cheapest_within,
    frontier,
    keep_lines,
    most_states,
    option_of,
    options,
)
from strategies.rematerialization.price.costs import Prices
from strategies.rematerialization.price.in_place import in_place
from strategies.rematerialization.price.margin import with_margin, without_margin
from strategies.rematerialization.price.non_region_memory import NonRegionMemory
from strategies.rematerialization.price.option_store import OptionStore
from strategies.rematerialization.price.uncaptured_options import unchanged_option
from strategies.rematerialization.recompute_plan import BudgetError, RecomputePlan
from strategies.rematerialization.solve.chain_program import (
    ChainSchedule,
    Link,
    Option,
    replay,
    segments_in,
    solve_chain,
)
from strategies.rematerialization.solve.checkmate import check_size, optimal
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.keep_frontier import Kept, least_total
from strategies.rematerialization.solve.lower_bound import least_bytes
from strategies.rematerialization.solve.solver import Infeasible, least_peak, solve
from strategies.rematerialization.solve.unchanged_blocks import with_unchanged

CLOSE_ENOUGH = 1e-3  # of a step's time: the search over a whole network stops once no plan can save more than this
NEARLY = 0.1  # of what comes and goes in a step: budgets so much lower may still let blocks run unchanged
LEAST_MOVES = 400_000  # moves in the search for the lowest peak of a whole network
STATES = 12_288  # bytes of RNG states that a segment saves on CPU, before its first block and after its last run


class Planner:
    """Everything known about a training step, from which a plan for any budget can be made.

    Args:
        calls: captured regions in call order.
        frame: memory held outside the regions.
        prices: time and workspace of operations.
        fallback: options of a region that could not be captured, and the seconds of its forward.
        apart: whether no segment may span several regions, because each has its weights only while it is called.
        solver: how each region's schedules are found: "auto" searches and bounds what is left to gain; "exact" solves
            Checkmate's program to proven optimality.
        store: keeps results from one process to the next.

    Attributes:
        unchanged: whether blocks that recompute nothing may run unchanged. Inductor would not compile these.

    Raises:
        NotExact: a region is too large for the exact program.
    """

    def __init__(self, calls: Sequence[RegionCall], frame: NonRegionMemory, prices: Prices,
                 fallback: Callable[[RegionCall], tuple[tuple[Option, ...], float]], apart: bool = False,
                 solver: str = "auto", store: OptionStore | None = None) -> None:
        self.calls, self.frame, self.prices = calls, frame, prices
        self.fallback, self.apart, self.solver, self.store = fallback, apart, solver, store
        for call in calls if solver == "exact" else ():
            if call.captured is not None:
                check_size(name_of(call), len(call.captured.operations) + 1)
        self.unchanged = True
        self._options: dict[str, tuple[Option, ...]] = {}
        self._lines: dict[str, tuple[tuple[float, float], ...]] = {}
        self._problems: dict[str, Graph] = {}
        self._steady: dict[str, tuple[Option, ...]] = {}
        self._steady_priced: dict[str, tuple[Option, ...]] = {}
        self._whole: dict[str, Option] = {}
        self._as_it_is: dict[str, Option] = {}
        self._made_for: dict[int, str] = {}

    @property
    def single(self) -> bool:
        """Whether the chain is one captured region, which is then solved for the budget directly."""
        return len(self.calls) == 1 and self.calls[0].captured is not None

    @cached_property
    def links(self) -> list[Link]:
        """The regions with their options, as links of the chain."""
        for call in tracked(self._kinds, "kinds of blocks"):
            self._ways(call)
        return [self._link(index, *self._ways(call)) for index, call in enumerate(self.calls)]

    @cached_property
    def seconds(self) -> float:
        """Seconds of forward and backward of all regions, without recomputation."""
        return sum(self._seconds(call) for call in self.calls)

    def fits_as_it_is(self, budget: int, margin: bool = False) -> bool:
        """Whether the plan without recomputation fits.

        Args:
            margin: also leave room for kernels' own buffers, which a step without regions does not count.
        """
        peak = self.keep_all().peak
        return (with_margin(peak, self.frame.base) if margin and not self.calls else peak) <= budget

    def keep_all(self) -> RecomputePlan:
        """The plan without recomputation."""
        return self._plan(None, whole(len(self.calls)), self._keeping, 0.0)

    @cached_property
    def _keeping(self) -> list[Link]:
        """The regions with a single option each, which keeps everything; this needs no search."""
        return [self._link(index, (self._kept_whole(call),), self._forward(call)) for index, call
                in enumerate(self.calls)]

    def _kept_whole(self, call: RegionCall) -> Option:
        if call.captured is None:
            return self.fallback(call)[0][0]
        signature = call.captured.signature
        if signature not in self._whole:
            graph = self._problem(call.captured)
            kept = option_of(call.captured, graph, range(len(graph.seconds)))
            self._whole[signature] = self._own(call.captured, kept)
        return self._whole[signature]

    def plan(self, budget: int, seconds: float = 20.0) -> RecomputePlan:
        """The plan with the least recomputation found whose predicted peak is within the budget.

        Args:
            budget: bytes, everything included.
            seconds: time limit for a single region, which is solved for this budget.

        Raises:
            BudgetError: no plan fits.
        """
        everything = self.keep_all()
        if everything.peak <= budget:
            everything.budget = budget
            return self._with_unchanged(everything) if self.unchanged else everything
        if self.single:
            return self._plan_single(budget, seconds)
        room = without_margin(budget, self.frame.base)
        nearly = self._nearly_all_kept(budget, room, everything.peak) if self.unchanged else None
        if nearly is not None:
            return nearly
        schedule = solve_chain(self.links, self.frame.head, room) if self._around <= room else None
        if schedule is not None and self._plan(budget, schedule, self.links, 0.0).peak > budget:  # RNG states
            schedule = solve_chain(self.links, self.frame.head, room - STATES * len(self.links))
        if schedule is None and self._around <= room:  # finer memory slots lose less to rounding
            schedule = solve_chain(self.links, self.frame.head, room - STATES * len(self.links), slots=8000)
        if schedule is None and self.least.peak <= budget:
            return replace(self.least, budget=budget, bound=self._bound(budget))
        if schedule is None:
            raise self._refusal(budget)
        return self._plan(budget, schedule, self.links, self._bound(budget))

    def _nearly_all_kept(self, budget: int, room: int, peak: int) -> RecomputePlan | None:
        """For a budget a little below what keeping all needs, a plan some of whose blocks run unchanged; else None.

        It follows from bytes and roofline times, which are the same in every process; see `_with_unchanged`.
        """
        if self.solver == "exact" or self._around > room or budget < peak - NEARLY * (peak - self.frame.base):
            return None
        schedule = solve_chain(self._steady_links, self.frame.head, room)
        if schedule is None:
            return None
        plan = self._plan(budget, schedule, self._priced_links, self._bound(budget))
        found = self._with_unchanged(plan)
        return None if found is plan or found.peak > budget else found

    def _with_unchanged(self, plan: RecomputePlan) -> RecomputePlan:
        """The plan with those of its captured blocks running unchanged for which its budget has room.

        It is for plans that follow from bytes alone: graphs of blocks with dropout, or of several that read one tensor,
        may round otherwise, and measured times, which differ between processes, must not decide about bits.
        """
        links, unchanged = list(plan.links), {}
        for index, call in enumerate(self.calls):
            if call.captured is not None and call.measured is not None:
                unchanged[index] = len(links[index].options)
                links[index] = replace(links[index], options=(*links[index].options, self._unchanged(call)))

        def made(schedule: ChainSchedule) -> RecomputePlan:
            return self._plan(plan.budget, schedule, links, plan.bound)

        schedule = with_unchanged(links, plan.schedule, unchanged, lambda trial: made(trial).peak <= plan.budget)
        return plan if schedule == plan.schedule else replace(made(schedule), solver=plan.solver)

    def _unchanged(self, call: RegionCall) -> Option:
        signature = call.captured.signature
        if signature not in self._as_it_is:
            self._as_it_is[signature] = unchanged_option(call.measured, self.prices.price(call.captured)[1],
                                                         call.captured.forward)
        return self._as_it_is[signature]

    @cached_property
    def least(self) -> RecomputePlan:
        """The plan with the lowest peak found.

        It limits the search by moves, not time, and takes times from the roofline, so that it is the same in every run.
        Measured times would lead the search elsewhere each time, and the minimum budget that an error reports could
        then be refused when it is tried.
        """
        if self.single:
            captured = self.calls[0].captured
            found = least_peak(self._in_place(0, self.prices.roofline(captured)), 60.0, iterations=LEAST_MOVES)
            found = solve(self._in_place(0), found.peak, 10.0, bound=False, start=found.order)  # recompute less
            option = self._own(captured, option_of(captured, self._problem(captured), found.order))
            return replace(self._plan(None, whole(1), [self._link(0, (option,), self._forward(self.calls[0]))], 0.0),
                           solver="auto")
        steady = self._steady_links
        low, high = self.least_bound, self.keep_all().peak
        best = whole(len(self.calls))
        while high - low > max(1024, high // 500):
            middle = (low + high) // 2
            found = solve_chain(steady, self.frame.head, middle) if middle >= self._around else None
            if found is None:
                low = middle
            else:
                best = found
                high = max(self._around, replay(steady, found, self.frame.head).peak)
        return replace(self._plan(None, best, self._priced_links, 0.0), solver="auto")

    @cached_property
    def _steady_links(self) -> list[Link]:
        """The regions with reproducible options and times, found by the roofline."""
        for call in tracked(self._kinds, "kinds of blocks"):
            self._steady_ways(call)
        return [self._link(index, *self._steady_ways(call)) for index, call in enumerate(self.calls)]

    @cached_property
    def _priced_links(self) -> list[Link]:
        """The regions with the same options, priced."""
        return [self._link(index, self._priced(call, link.options), self._forward(call))
                for index, (call, link) in enumerate(zip(self.calls, self._steady_links, strict=True))]

    @cached_property
    def least_bound(self) -> int:
        """Proven lower bound on any plan's peak, in bytes.

        The larger of what is held outside the regions and each region's most demanding operation together with what is
        held around it.
        """
        captured = [index for index, call in enumerate(self.calls) if call.captured is not None]
        return max([self._around, *(least_bytes(self._in_place(index)) for index in captured)]) - self.frame.spare

    @property
    def _around(self) -> int:
        return max(self.frame.start, self.frame.end, self.frame.update, self.frame.head)

    def _plan(self, budget: int | None, schedule: ChainSchedule, links: Sequence[Link], bound: float) -> RecomputePlan:
        found = replay(links, schedule, self.frame.head)
        states = STATES * segments_in(schedule)
        peak = max(found.peak + states, self._around)
        peak = with_margin(peak, self.frame.base) if self.calls else peak  # else it is counted in the real step
        return RecomputePlan(budget, peak, schedule, found, self.frame, links, self.calls, self.seconds, bound,
                    resident=self._resident, solver=self.solver)

    def _resident(self, position: int, option: Option) -> tuple[list[int], list[int]]:
        graph = self._problem(self.calls[position].captured)
        resident, border = simulate(graph, option.order).resident.tolist(), list(option.order).index(graph.forward)
        return resident[:border], resident[border + 1:]

    def _plan_single(self, budget: int, seconds: float) -> RecomputePlan:
        call, fitting = self.calls[0], without_margin(budget, self.frame.base)
        graph = self._in_place(0)
        try:
            if self._around > fitting:
                raise self._refusal(budget)
            best = optimal(graph, fitting, name_of(call)).order if self.solver == "exact" else None
            found = solve(graph, fitting, seconds, gap=CLOSE_ENOUGH, start=best)
        except Infeasible:
            if self.least.peak <= budget:
                return replace(self.least, budget=budget)
            raise self._refusal(budget) from None
        option = self._own(call.captured, option_of(call.captured, self._problem(call.captured), found.order))
        bound = 0.0 if self.frame.spare else max(0.0, found.bound - float(graph.seconds.sum()))
        plan = self._plan(budget, whole(1), [self._link(0, (option,), self._forward(call))], bound)
        return replace(plan, solver="auto" if best is None else "exact")

    def _in_place(self, index: int, seconds: np.ndarray | None = None) -> Graph:
        """A region's rematerialization problem with the memory that others hold during each of its phases."""
        call = self.calls[index]
        return in_place(self._problem(call.captured), self.frame, index, index == len(self.calls) - 1,
                        call.input if self.single else 0, seconds)

    def _refusal(self, budget: int) -> BudgetError:
        least = self.least
        return BudgetError(budget, least.peak, self.least_bound,
                           {**self.frame.parts, "activations and temporaries": least.peak - self.frame.base})

    def _problem(self, captured: Captured) -> Graph:
        if captured.signature not in self._problems:
            self._problems[captured.signature] = problem(captured, *self.prices.price(captured))
        return self._problems[captured.signature]

    @property
    def _kinds(self) -> list[RegionCall]:
        """The first region of each kind that was captured: searches for others of its kind are the same."""
        kinds: dict[str, RegionCall] = {}
        for call in self.calls:
            if call.captured is not None:
                kinds.setdefault(call.captured.signature, call)
        return list(kinds.values())

    def _ways(self, call: RegionCall) -> tuple[tuple[Option, ...], float]:
        if call.captured is None:
            return self.fallback(call)
        signature = call.captured.signature
        if signature not in self._options:
            self._options[signature] = self._made(call)
        return self._options[signature], self._forward(call)

    def _made(self, call: RegionCall) -> tuple[Option, ...]:
        captured = call.captured
        if self.single:
            return (self._kept_whole(call),)
        steady = self._priced(call, self._steady_ways(call)[0])
        found = self._searched(captured, self.prices.price(captured)[0]) if self.prices.measure else ()
        if self.solver == "exact" and found:  # optimal at these prices; roofline options are not
            return tuple(self._own(captured, option) for option in found)
        more = [self._own(captured, option) for option in frontier([*steady, *found]) if option not in steady]
        return tuple(sorted([*steady, *more], key=lambda way: (way.seconds, way.kept, way.backward_peak)))

    def _steady_ways(self, call: RegionCall) -> tuple[tuple[Option, ...], float]:
        """Reproducible options of a region, found with roofline times, and the roofline seconds of its forward."""
        if call.captured is None:
            return self.fallback(call)
        seconds, signature = self.prices.roofline(call.captured), call.captured.signature
        if signature not in self._steady:
            self._steady[signature] = self._searched(call.captured, seconds)
        return self._steady[signature], float(seconds[:call.captured.forward].sum())

    def _searched(self, captured: Captured, seconds: np.ndarray) -> tuple[Option, ...]:
        return options(captured, seconds, self.prices.price(captured)[1], solver=self.solver, store=self.store)

    def _priced(self, call: RegionCall, ways: Sequence[Option]) -> tuple[Option, ...]:
        """The same options in the same order, with seconds taken from the planner's prices."""
        if call.captured is None:
            return tuple(ways)
        signature = call.captured.signature
        if signature not in self._steady_priced:
            graph = self._problem(call.captured)
            self._steady_priced[signature] = tuple(
                self._own(call.captured, option_of(call.captured, graph, way.order)) for way in ways)
        return self._steady_priced[signature]

    def _own(self, captured: Captured, option: Option) -> Option:
        self._made_for[id(option)] = captured.signature
        return option

    def _link(self, index: int, ways: tuple[Option, ...], forward: float) -> Link:
        frame, call = self.frame, self.calls[index]
        return Link(ways, call.input, forward, frame.before[index], frame.behind[index], frame.arriving[index],
                    self.apart or not call.chained, frame.fresh[index])

    def _forward(self, call: RegionCall) -> float:
        if call.captured is None:
            return self.fallback(call)[1]
        return float(self.prices.price(call.captured)[0][:call.captured.forward].sum())

    def _seconds(self, call: RegionCall) -> float:
        return float(self.prices.price(call.captured)[0].sum()) if call.captured is not None else 0.0

    def _bound(self, budget: int) -> float:
        """Proven lower bound on the seconds of recomputation of any schedule of the chain.

        At the turn from forward to backward, everything that the regions keep is resident at once, and so is the input
        of each that is not inside a segment.
        """
        blocks = []
        inputs = [call.input for call in self.calls]
        for call, handed in zip(self.calls, [*inputs[1:], 0], strict=True):
            if call.captured is None:
                return 0.0
            if call.captured.signature not in self._lines:
                self._lines[call.captured.signature] = keep_lines(
                    call.captured, *self.prices.price(call.captured), store=self.store)
            blocks.append(Kept(self._lines[call.captured.signature], handed, self._forward(call)))
        return least_total(blocks, budget - self.frame.head + self.frame.spare - inputs[0])

    def orders(self, captured: Captured, option: Option) -> Sequence[int]:
        """The order of operations for a captured graph under an option.

        For shapes that were not planned for, it is an order that keeps and needs no more memory than the option does.
        """
        if self._made_for.get(id(option)) == captured.signature:
            return option.order
        prices = Prices(self.prices.device).price(captured)
        states = most_states(captured)
        order = cheapest_within(captured, *prices, option.kept - states, option.backward_peak - states)
        if order is not None:
            return order
        return min(options(captured, *prices), key=lambda way: way.backward_peak).order

    def install(self, plan: RecomputePlan, inductor: bool = False, model: nn.Module | None = None) -> None:
        """Install a plan in the planned model, or in another model of the same shapes."""
        modules = [call.module if model is None else model.get_submodule(call.name) for call in self.calls]
        plan.planned = Planned(modules, plan.schedule, [link.options for link in plan.links], self.orders, inductor)
        plan.planned.install()


def name_of(call: RegionCall) -> str:
    """A region's name in the model, or its class if it is the model itself."""
    return call.name or type(call.module).__name__

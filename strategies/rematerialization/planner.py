"""From a model and a batch to a plan: capture, price, look at what is around, and solve for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from strategies.rematerialization.bound import least_bytes
from strategies.rematerialization.capture import Captured, problem
from strategies.rematerialization.chain import (
    Block,
    Link,
    Option,
    Replay,
    Schedule,
    Segment,
    leaves,
    replay,
    solve_chain,
)
from strategies.rematerialization.frame import Frame
from strategies.rematerialization.options import bound_curve, option_of, options
from strategies.rematerialization.planned import Planned, whole
from strategies.rematerialization.price import Prices
from strategies.rematerialization.regions import Call
from strategies.rematerialization.solve import Infeasible, least_peak, solve

# What a count of tensors cannot see, small temporaries and buffers of kernels: a part of what comes and goes, and
# 96 KiB, or a hundredth of what comes and goes where that is less.
MARGIN_SHARE, MARGIN_BYTES, MARGIN_OF_SMALL = 0.003, 98_304, 0.01
STATES = 12_288  # bytes of generator states that a segment keeps for each of its blocks, on CPU


class BudgetError(ValueError):
    """A budget that cannot be met.

    Attributes:
        budget: bytes asked for.
        least: the least peak for which there is a plan, in bytes.
        bound: bytes that no plan can do without, proven.
        parts: bytes of the largest parts at the least peak.
    """

    def __init__(self, budget: int, least: int, bound: int, parts: Mapping[str, int]) -> None:
        self.budget, self.least, self.bound, self.parts = budget, least, bound, dict(parts)
        by_size = sorted(parts.items(), key=lambda part: -part[1])
        largest = ", ".join(f"{name} {count:,}" for name, count in by_size[:4])
        super().__init__(f"a budget of {budget:,} bytes cannot be met: the least for which there is a plan is "
                         f"{least:,} bytes, and no plan needs less than {bound:,} (largest parts: {largest}); a "
                         "smaller micro-batch, an optimizer with less state or a lower precision need less")


@dataclass(eq=False)
class Plan:
    """What a model keeps and recomputes, and what that was found to need.

    Attributes:
        budget: bytes allowed; None keeps all.
        peak: predicted bytes at the peak of a step, everything counted.
        schedule: the option of every region, and segments.
        replay: bytes of the regions' moments.
        frame: what everything else holds.
        links: the regions with their options, as the master problem sees them.
        calls: the regions.
        seconds: of forward and backward of all regions, each operation once, by the prices.
        bound: seconds of recomputation below which no schedule of the regions fits, proven.
    """

    budget: int | None
    peak: int
    schedule: Schedule
    replay: Replay
    frame: Frame
    links: Sequence[Link]
    calls: Sequence[Call]
    seconds: float
    bound: float
    planned: Planned | None = field(default=None, repr=False)

    @property
    def recomputed(self) -> float:
        """Seconds of recomputation."""
        return self.replay.seconds

    @property
    def overhead(self) -> float:
        """Recomputation as a share of the regions' own time."""
        return self.recomputed / self.seconds if self.seconds else 0.0

    @property
    def gap(self) -> float:
        """How much of the step a better schedule could save at most: (found - bound) / found."""
        found = self.seconds + self.recomputed
        return max(0.0, self.recomputed - self.bound) / found if found else 0.0

    @property
    def fallbacks(self) -> list[str]:
        """Regions that could not be captured, and why."""
        return [f"{call.name or type(call.module).__name__}: {call.reason}" for call in self.calls
                if call.captured is None]

    def parts(self) -> tuple[str, dict[str, int]]:
        """When the peak is, and its bytes by what they are.

        What regions keep and recompute are activations; gradients are those that exist then; the rest, logits and
        their gradients for example, are the loss and temporaries.
        """
        moments = [("start", self.frame.start), ("head", self.frame.head), ("end", self.frame.end),
                   ("update", self.frame.update)]
        moment, around = max(moments, key=lambda entry: entry[1])
        position, kept = -1, 0
        if self.replay.peak >= around:
            moment, position, _ = max(self.replay.moments, key=lambda entry: entry[2])
            held = {"forward": self.frame.before, "backward": self.frame.behind}.get(moment)
            around = self.frame.head if held is None else held[position]
            kept = self.replay.peak - around
        gradients = self._gradients(moment, position)
        rest = self.peak - kept - self.frame.base - gradients
        found = dict(self.frame.parts)
        found["gradients"] = found.get("gradients", 0) + gradients
        found |= {"activations": kept, "loss and temporaries": rest} if self.calls else {
            "activations, loss and temporaries": rest}
        names = {"start": "before the first block", "head": "loss", "end": "end of the backward", "update": "optimizer"}
        return names.get(moment, f"{moment} of block {position}"), found

    def _gradients(self, moment: str, position: int) -> int:
        """Bytes of gradients that did not exist when the step began."""
        after = {"backward": self.calls[position + 1:], "end": self.calls, "update": self.calls}.get(moment, [])
        new = sum(parameter.numel() * parameter.element_size() for call in after for parameter in
                  call.module.parameters() if parameter.requires_grad)
        return 0 if self.frame.parts.get("gradients") else new

    def blocks(self) -> list[dict[str, object]]:
        """How every region runs: bytes kept beside its input, seconds recomputed, and the segment it is in."""
        found = []
        for item in self.schedule:
            segment = None if isinstance(item, Block) else (item.first, item.last - 1)
            for position, which in leaves(item):
                option = self.links[position].options[which]
                found.append({"name": self.calls[position].name, "mode": option.mode, "kept": option.kept,
                              "seconds": option.seconds, "segment": segment})
        return found

    def curve(self) -> tuple[list[tuple[int, int]], tuple[tuple[str, int], ...]]:
        """Planned bytes over the step as (position, bytes), and where its phases begin."""
        frame, moments = self.frame, self.replay.moments
        if not self.calls:
            return list(enumerate(frame.timeline)), frame.marks
        head = next((index for index, (name, _, _) in enumerate(moments) if name == "head"), len(moments))
        ahead, behind = [count for *_, count in moments[:head + 1]], [count for *_, count in moments[head + 1:]]
        values = [frame.base, frame.start, *ahead, *behind, frame.end, frame.update, frame.base]
        marks = (("forward", 0), ("backward", 2 + head), ("update", len(values) - 2))
        return list(enumerate(values)), marks

    def __str__(self) -> str:
        moment, parts = self.parts()
        limit = "no budget" if self.budget is None else f"budget {self.budget:,} bytes"
        lines = [f"{limit}; predicted peak {self.peak:,} bytes ({moment}); recomputation {self.overhead:.1%} of the "
                 f"blocks' time, at most {self.gap:.1%} more than any schedule needs"]
        largest = sorted(parts.items(), key=lambda part: -part[1])
        lines += [f"  {name:<22} {count:>16,}" for name, count in largest if count]
        return "\n".join([*lines, *(f"  not planned: {text}" for text in self.fallbacks)])

    def remove(self) -> None:
        """Take the plan out of the model."""
        if self.planned is not None:
            self.planned.remove()


class Planner:
    """Everything known of a step, from which plans for any budget follow.

    Args:
        calls: captured regions in the order they are called.
        frame: what everything else holds.
        prices: of operations.
        fallback: options of a region that could not be captured.
    """

    def __init__(self, calls: Sequence[Call], frame: Frame, prices: Prices,
                 fallback: Callable[[Call], tuple[tuple[Option, ...], float]]) -> None:
        self.calls, self.frame, self.prices = calls, frame, prices
        self.fallback = fallback
        self._options: dict[str, tuple[Option, ...]] = {}
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._made_for: dict[int, str] = {}

    @property
    def single(self) -> bool:
        """Whether one region is the whole problem, to be solved for the budget itself."""
        return len(self.calls) == 1 and self.calls[0].captured is not None

    @cached_property
    def links(self) -> list[Link]:
        """The regions with their options."""
        return [self._link(index, *self._ways(call)) for index, call in enumerate(self.calls)]

    @cached_property
    def seconds(self) -> float:
        """Seconds of forward and backward of all regions without recomputation."""
        return sum(self._seconds(call) for call in self.calls)

    def keep_all(self) -> Plan:
        """The plan that recomputes nothing."""
        return self._plan(None, whole(len(self.calls)), self.links, 0.0)

    def plan(self, budget: int, seconds: float = 20.0) -> Plan:
        """The plan with the least recomputation found whose predicted peak is within the budget.

        Args:
            budget: bytes, everything counted.
            seconds: most time for a region that is solved for this budget.

        Raises:
            BudgetError: none fits.
        """
        everything = self.keep_all()
        if everything.peak <= budget:
            everything.budget = budget
            return everything
        if self.single:
            return self._plan_single(budget, seconds)
        room = self._without_margin(budget)
        schedule = solve_chain(self.links, self.frame.head, room) if self._around <= room else None
        if schedule is not None and self._plan(budget, schedule, self.links, 0.0).peak > budget:  # by segments' states
            schedule = solve_chain(self.links, self.frame.head, room - STATES * len(self.links))
        if schedule is None and self._around <= room:  # memory in finer pieces loses less by rounding
            schedule = solve_chain(self.links, self.frame.head, room - STATES * len(self.links), slots=8000)
        if schedule is None and self.least.peak <= budget:
            schedule = self.least.schedule
        if schedule is None:
            raise self._refusal(budget)
        return self._plan(budget, schedule, self.links, self._bound(budget))

    @cached_property
    def least(self) -> Plan:
        """The plan with the least peak that was found."""
        if self.single:
            captured = self.calls[0].captured
            graph = self._problem(captured)
            found = least_peak(graph, 10.0)
            found = solve(graph, found.peak, 10.0, bound=False, start=found.order)  # as low, at less recomputation
            option = self._own(captured, option_of(captured, graph, found.order))
            return self._plan(None, whole(1), [self._link(0, (option,), self._forward(self.calls[0]))], 0.0)
        low, high = self.least_bound, self.keep_all().peak
        best = whole(len(self.calls))
        while high - low > max(1024, high // 500):
            middle = (low + high) // 2
            found = solve_chain(self.links, self.frame.head, middle) if middle >= self._around else None
            if found is None:
                low = middle
            else:
                best = found
                high = max(self._around, replay(self.links, found, self.frame.head).peak)
        return self._plan(None, best, self.links, 0.0)

    @cached_property
    def least_bound(self) -> int:
        """Bytes that no plan can do without, proven: each region's largest operation, with what others hold then."""
        needs = [self._around]
        for index, call in enumerate(self.calls):
            if call.captured is not None:
                needs.append(self.frame.behind[index] + least_bytes(self._problem(call.captured)))
        return max(needs)

    @property
    def _around(self) -> int:
        return max(self.frame.start, self.frame.end, self.frame.update, self.frame.head)

    def _plan(self, budget: int | None, schedule: Schedule, links: Sequence[Link], bound: float) -> Plan:
        found = replay(links, schedule, self.frame.head)
        states = STATES * sum(item.last - item.first for item in schedule if isinstance(item, Segment))
        peak = self._with_margin(max(found.peak + states, self._around))
        return Plan(budget, peak, schedule, found, self.frame, links, self.calls, self.seconds, bound)

    def _with_margin(self, count: int) -> int:
        """Bytes of a peak with what the count of it misses; a step without regions is counted as it runs."""
        moving = count - self.frame.base
        return count + int(MARGIN_SHARE * moving + min(MARGIN_BYTES, MARGIN_OF_SMALL * moving)) if self.calls else count

    def _without_margin(self, budget: int) -> int:
        moving = budget - self.frame.base
        return self.frame.base + int(max((moving - MARGIN_BYTES) / (1 + MARGIN_SHARE),
                                         moving / (1 + MARGIN_SHARE + MARGIN_OF_SMALL))) - 1

    def _plan_single(self, budget: int, seconds: float) -> Plan:
        call, frame = self.calls[0], self.frame
        fitting = self._without_margin(budget)
        room = fitting - max(frame.before[0], frame.behind[0]) - call.input
        graph = problem(call.captured, *self.prices.price(call.captured), fitting - frame.head - call.input, room)
        try:
            if room <= 0 or self._around > fitting:
                raise self._refusal(budget)
            found = solve(graph, room, seconds)
        except Infeasible:
            if self.least.peak <= budget:
                return replace(self.least, budget=budget)
            raise self._refusal(budget) from None
        option = self._own(call.captured, option_of(call.captured, self._problem(call.captured), found.order))
        bound = max(0.0, found.bound - float(graph.seconds.sum()))
        return self._plan(budget, whole(1), [self._link(0, (option,), self._forward(call))], bound)

    def _refusal(self, budget: int) -> BudgetError:
        least = self.least
        return BudgetError(budget, least.peak, self.least_bound,
                           {**self.frame.parts, "activations and temporaries": least.peak - self.frame.base})

    def _problem(self, captured: Captured):
        return problem(captured, *self.prices.price(captured))

    def _ways(self, call: Call) -> tuple[tuple[Option, ...], float]:
        if call.captured is None:
            return self.fallback(call)
        signature = call.captured.signature
        if signature not in self._options:
            self._options[signature] = self._made(call.captured)
        return self._options[signature], self._forward(call)

    def _made(self, captured: Captured) -> tuple[Option, ...]:
        if self.single:
            graph = self._problem(captured)
            return (self._own(captured, option_of(captured, graph, range(len(graph.seconds)))),)
        return tuple(self._own(captured, option) for option in options(captured, *self.prices.price(captured)))

    def _own(self, captured: Captured, option: Option) -> Option:
        self._made_for[id(option)] = captured.signature
        return option

    def _link(self, index: int, ways: tuple[Option, ...], forward: float) -> Link:
        frame, call = self.frame, self.calls[index]
        return Link(ways, call.input, forward, frame.before[index], frame.behind[index], frame.arriving[index],
                    cut=not call.chained)

    def _forward(self, call: Call) -> float:
        return float(self.prices.price(call.captured)[0][:call.captured.forward].sum())

    def _seconds(self, call: Call) -> float:
        return float(self.prices.price(call.captured)[0].sum()) if call.captured is not None else 0.0

    def _bound(self, budget: int) -> float:
        """Seconds of recomputation that no schedule of the chain can do without.

        When the loss turns back, everything that regions keep is there at once.
        """
        curves = []
        for call in self.calls:
            if call.captured is None:
                return 0.0
            if call.captured.signature not in self._curves:
                self._curves[call.captured.signature] = bound_curve(call.captured, *self.prices.price(call.captured))
            curves.append(self._curves[call.captured.signature])
        return least_sum(curves, budget - self.frame.head)

    def orders(self, captured: Captured, option: Option) -> Sequence[int]:
        """How to run a graph by an option; for a shape that was not planned for, one that keeps and needs no more."""
        if self._made_for.get(id(option)) == captured.signature:
            return option.order
        if captured.signature not in self._options:
            self._options[captured.signature] = tuple(
                self._own(captured, made) for made in options(captured, *Prices(self.prices.device).price(captured)))
        ways = self._options[captured.signature]
        fitting = [way for way in ways if way.kept <= option.kept and way.backward_peak <= option.backward_peak]
        return min(fitting or ways, key=lambda way: way.seconds if fitting else way.backward_peak).order

    def install(self, plan: Plan, inductor: bool = False) -> None:
        """Make the model run by a plan."""
        plan.planned = Planned([call.module for call in self.calls], plan.schedule,
                               [link.options for link in plan.links], self.orders, inductor)
        plan.planned.install()


def least_sum(curves: Sequence[Sequence[tuple[int, float]]], room: int) -> float:
    """Least sum of functions whose arguments sum to at most `room`, each bounded from below by points of it.

    Args:
        curves: for each function, which falls, values at increasing arguments. Between two points it is at least the
            value at the right one.
        room: what is shared out.
    """
    pieces: list[tuple[float, int]] = []
    total = 0.0
    for curve in curves:
        corners = [(bytes_, following) for (bytes_, _), (_, following) in zip(curve, curve[1:], strict=False)]
        hull = _lower_hull([*corners, curve[-1]])
        total += hull[0][1]
        room -= hull[0][0]
        pieces += [((left[1] - right[1]) / (right[0] - left[0]), right[0] - left[0])
                   for left, right in zip(hull, hull[1:], strict=False)]
    for slope, width in sorted(pieces, reverse=True):
        used = min(max(room, 0), width)
        total -= slope * used
        room -= used
    return max(0.0, total)


def _lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for point in sorted(set(points)):
        if hull and point[0] == hull[-1][0]:
            continue
        while len(hull) >= 2 and ((hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0])
                                  >= (point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0])):
            hull.pop()
        hull.append(point)
    return hull

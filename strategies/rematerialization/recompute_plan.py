"""A recompute plan as data: what a model keeps and recomputes, its predicted peak memory, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from strategies.rematerialization.capture.regions import RegionCall
from strategies.rematerialization.execute.installed import Planned
from strategies.rematerialization.price.non_region_memory import NonRegionMemory
from strategies.rematerialization.solve.chain_program import Block, ChainSchedule, Link, Option, Replay, leaves

PROVEN = "each block's schedule is proven optimal by Checkmate's exact program, for the bytes it keeps and its peak"

MOMENTS = {"start": "before the first block", "head": "loss", "end": "end of the backward", "update": "optimizer"}


class BudgetError(ValueError):
    """The memory budget cannot be met.

    Attributes:
        budget: bytes requested.
        least: lowest peak for which a plan was found, in bytes.
        bound: proven lower bound on any plan's peak, in bytes.
        parts: bytes by name at the lowest peak.
    """

    def __init__(self, budget: int, least: int, bound: int, parts: Mapping[str, int]) -> None:
        self.budget, self.least, self.bound, self.parts = budget, least, bound, dict(parts)
        by_size = sorted(parts.items(), key=lambda part: -part[1])
        largest = ", ".join(f"{name} {count:,}" for name, count in by_size[:4])
        super().__init__(f"a budget of {budget:,} bytes cannot be met: the least for which there is a plan is "
                         f"{least:,} bytes, and no plan needs less than {bound:,} (largest parts: {largest}); a "
                         "smaller micro-batch, an optimizer with less state or a lower precision need less")

    def beside(self, other: RecomputePlan) -> BudgetError:
        """The error when another plan was found, too: its peak is the least if it is the lower one."""
        if other.peak >= self.least:
            return self
        return BudgetError(self.budget, other.peak, min(self.bound, other.peak), other.parts()[1])


@dataclass(eq=False)
class RecomputePlan:
    """What a model keeps and recomputes, with the predicted memory and time.

    Attributes:
        budget: bytes allowed; None for a plan made without a budget.
        peak: predicted peak memory of a step in bytes, everything included.
        schedule: the option chosen for each region, and the segments.
        replay: bytes at each moment of the chain, and the seconds recomputed.
        frame: memory held outside the regions.
        links: the regions with their options, as the chain's dynamic program sees them.
        calls: the regions in call order.
        seconds: predicted time of forward and backward of all regions, each operation run once.
        bound: proven lower bound on the seconds of recomputation of any schedule that fits.
        planned: handle on the model that the plan is installed in, if any.
        resident: given a region's position and an option, resident bytes at every operation of forward and backward.
        solver: how the regions' schedules were found: "auto", or "exact" if Checkmate's program proves for each that no
            schedule of its kind recomputes less with the same bytes kept and the same peak.
        compiled: where that was chosen, whether Inductor or eager kernels run the schedules, and why.
    """

    budget: int | None
    peak: int
    schedule: ChainSchedule
    replay: Replay
    frame: NonRegionMemory
    links: Sequence[Link]
    calls: Sequence[RegionCall]
    seconds: float
    bound: float
    planned: Planned | None = field(default=None, repr=False)
    resident: Callable[[int, Option], tuple[list[int], list[int]]] | None = field(default=None, repr=False)
    solver: str = "auto"
    compiled: str | None = None

    @property
    def recomputed(self) -> float:
        """Seconds of recomputation."""
        return self.replay.seconds

    @property
    def overhead(self) -> float:
        """Recomputation as a fraction of the regions' own time."""
        return self.recomputed / self.seconds if self.seconds else 0.0

    @property
    def gap(self) -> float:
        """Upper bound on the fraction of the step that a better schedule could save: (found - bound) / found."""
        found = self.seconds + self.recomputed
        return max(0.0, self.recomputed - self.bound) / found if found else 0.0

    @property
    def fallbacks(self) -> list[str]:
        """Regions that could not be captured, with the reasons."""
        return [f"{call.name or type(call.module).__name__}: {call.reason}" for call in self.calls
                if call.captured is None]

    def parts(self) -> tuple[str, dict[str, int]]:
        """The moment of the peak, and its bytes by category.

        What regions keep and recompute counts as activations, and gradients are those that exist at that moment. The
        rest, such as logits and their gradients, counts as loss and temporaries.
        """
        if not self.calls:
            return self._parts_of_whole_step()
        moments = [("start", self.frame.start), ("head", self.frame.head), ("end", self.frame.end),
                   ("update", self.frame.update)]
        moment, around = max(moments, key=lambda entry: entry[1])
        position, kept = -1, 0
        if self.replay.peak >= around:
            moment, position, _ = max(self.replay.moments, key=lambda entry: entry[2])
            held = {"forward": self.frame.before, "backward": self.frame.behind}.get(moment)
            around = self.frame.head if held is None else held[position]
            kept = self.replay.peak - around
        came = self.frame.exchanged.get((moment, position if moment in ("forward", "backward") else -1))
        came = {"gradients": self._gradients(moment, position)} if came is None else came
        rest = self.peak - kept - self.frame.base - sum(came.values())
        found = dict(self.frame.parts)
        found |= {name: found.get(name, 0) + count for name, count in came.items()}
        found |= {"activations": kept, "loss and temporaries": rest}
        return MOMENTS.get(moment, f"{moment} of block {position}"), found

    def _parts_of_whole_step(self) -> tuple[str, dict[str, int]]:
        """The same for a model that runs unchanged, whose activations are not told from temporaries."""
        moment, gradients = self.frame.peak_of_whole_step()
        exchanged = self.frame.exchanged.get(("update" if moment == "update" else "head", -1))
        came = {"gradients": 0 if self.frame.parts.get("gradients") else gradients} if exchanged is None else exchanged
        found = {name: self.frame.parts.get(name, 0) + came.get(name, 0) for name in {**self.frame.parts, **came}}
        found["activations, loss and temporaries"] = self.peak - self.frame.base - sum(came.values())
        return MOMENTS.get(moment, moment), found

    def _gradients(self, moment: str, position: int) -> int:
        """Bytes of gradients at a moment that did not exist when the step began."""
        after = {"backward": self.calls[position + 1:], "end": self.calls, "update": self.calls}.get(moment, [])
        new = sum(parameter.numel() * parameter.element_size() for call in after for parameter in
                  call.module.parameters() if parameter.requires_grad)
        return 0 if self.frame.parts.get("gradients") or self.frame.drops else new

    def blocks(self) -> list[dict[str, object]]:
        """How each region runs: bytes kept beside its input, seconds recomputed, and the segment it belongs to."""
        found = []
        for item in self.schedule:
            segment = None if isinstance(item, Block) else (item.first, item.last - 1)
            for position, which in leaves(item):
                option = self.links[position].options[which]
                found.append({"name": self.calls[position].name, "mode": option.mode, "kept": option.kept,
                              "seconds": option.seconds, "segment": segment})
        return found

    def curve(self) -> tuple[list[tuple[int, int]], tuple[tuple[str, int], ...]]:
        """Predicted memory over the step as (position, bytes), operation by operation, and where its phases begin.

        It is scaled so that its maximum is the predicted peak, which includes the margin for what counting misses.
        """
        frame = self.frame
        if not self.calls:
            begin = frame.marks[0][1] if frame.marks else 0  # before that, the initial tensors are counted one by one
            return list(enumerate([frame.base, *frame.timeline[begin:]])), tuple(
                (name, position - begin) for name, position in frame.marks)
        chosen = dict(leaf for item in self.schedule for leaf in leaves(item))
        start, head, end, update = frame.around
        values, marks = [frame.base, *start], {"forward": 0}
        for name, position, count in self.replay.moments:
            if name == "head":
                if frame.loss is not None:
                    marks["loss"] = len(values) + frame.loss
                marks["backward"] = len(values) + frame.turn
                values += [count - frame.head + value for value in head or (frame.head,)]
            else:
                values += self._operations(name, position, self.links[position].options[chosen[position]], count)
        values += end
        marks["update"] = len(values)
        values += [*update, frame.base]
        scale = (self.peak - frame.base) / max(1, max(values) - frame.base)
        return [(at, round(frame.base + scale * (value - frame.base))) for at, value in enumerate(values)], tuple(
            marks.items())

    def _operations(self, phase: str, position: int, option: Option, most: int) -> list[int]:
        """Bytes at every operation of a block's forward or backward, shifted so that the maximum is `most`."""
        if self.resident is None or not option.order:
            return [most]
        forward, backward = self.resident(position, option)
        own = forward if phase == "forward" else backward
        return [most - max(own) + value for value in own] if own else [most]

    def __str__(self) -> str:
        moment, parts = self.parts()
        limit = "no budget" if self.budget is None else f"budget {self.budget:,} bytes"
        lines = [f"{limit}; predicted peak {self.peak:,} bytes ({moment}); recomputation {self.overhead:.1%} of the "
                 f"blocks' time, at most {self.gap:.1%} more than any schedule needs"]
        if self.solver == "exact":
            lines.append(f"  {PROVEN}")
        lines += [] if self.compiled is None else [f"  {self.compiled}"]
        largest = sorted(parts.items(), key=lambda part: -part[1])
        lines += [f"  {name:<22} {count:>16,}" for name, count in largest if count]
        return "\n".join([*lines, *(f"  not planned: {text}" for text in self.fallbacks)])

    def remove(self) -> None:
        """Remove the plan from the model."""
        if self.planned is not None:
            self.planned.remove()

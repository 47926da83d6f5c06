"""Dynamic program over a chain of blocks: choose each block's option and which runs of blocks to recompute.

The program is that of Beaumont et al. 2019 ("Optimal checkpointing for heterogeneous chains"), with several options for
every block, as in Rockmate (Zhao et al. 2023), and with the memory that is held outside the chain at each moment. A
segment is a run of consecutive blocks of which only the first input is kept. When the backward reaches it, its forward
runs again, with segments inside it where that pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from strategies.common.compiled import compiled

KEEP, CHECKPOINT = "keep", "checkpoint"  # modes of a block without a graph: run unchanged, or keep only its input


@dataclass(frozen=True, eq=False)
class Option:
    """One way to run a block: what it keeps from forward to backward, and what that costs.

    Attributes:
        kept: bytes kept between forward and backward, beside the block's input.
        forward_peak: peak bytes beside the input during the forward, its output and what it keeps included.
        backward_peak: the same for the backward: what is kept, incoming and outgoing gradients, temporaries.
        seconds: time of recomputation.
        order: the operations in execution order.
        mode: "planned" (runs by its order), `KEEP` or `CHECKPOINT`.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    seconds: float
    order: tuple[int, ...] = ()
    mode: str = "planned"


@dataclass(frozen=True, eq=False)
class Link:
    """A block in its place in the chain.

    Attributes:
        options: the ways to run it.
        input: bytes of its input, which is the previous block's output unless `cut`.
        seconds: time of its forward.
        before: bytes held outside the chain during its forward, excluding blocks' inputs and what blocks keep.
        behind: the same during its backward.
        arriving: bytes of the gradients of its output, which are resident while a segment that ends with it is
            recomputed.
        cut: whether its input comes from elsewhere, so that no segment can span the boundary before it.
        fresh: bytes of other arguments that no earlier block was given. A segment that began earlier holds them until
            the backward of its first block, whereas `behind` releases them with this block.
    """

    options: tuple[Option, ...]
    input: int
    seconds: float
    before: int
    behind: int
    arriving: int = 0
    cut: bool = False
    fresh: int = 0


@dataclass(frozen=True)
class Block:
    """A block and the option it runs by."""

    position: int
    option: int


@dataclass(frozen=True)
class Segment:
    """Blocks `first` to `last` (exclusive), keeping only the first input; `inside` says how they are recomputed."""

    first: int
    last: int
    inside: tuple[Block | Segment, ...]


ChainSchedule = tuple[Block | Segment, ...]


@dataclass
class Replay:
    """Memory over one step of a chain: moments as (name, position, bytes), and the seconds of recomputation."""

    moments: list[tuple[str, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Maximum bytes over all moments."""
        return max((count for _, _, count in self.moments), default=0)


def solve_chain(links: Sequence[Link], head: int, budget: int, slots: int = 2000) -> ChainSchedule | None:
    """The schedule with the least recomputation whose peak is within the budget, or None.

    Args:
        links: the blocks, first to last.
        head: peak bytes outside the chain between its forward and its backward, the chain's output included.
        budget: bytes.
        slots: number of units that memory is divided into; needs are rounded up, so more slots lose less.
    """
    if not links:
        return () if head <= budget else None
    for slack in (0.0, 0.003, 0.01, 0.03):  # win back what rounding up costs, if the exact peak fits
        schedule = _best(links, head, budget + int(slack * budget), slots)
        if schedule is not None and replay(links, schedule, head).peak <= budget:
            found = [one for one in (schedule, _at_one_price(links, head, budget)) if one is not None]
            return _spend(links, min(found, key=lambda one: replay(links, one, head).seconds), head, budget)
    return None


def _at_one_price(links: Sequence[Link], head: int, budget: int) -> ChainSchedule | None:
    """Every block by the option that is best at one price of a byte kept, the lowest that fits; None if none does.

    As many blocks as fit take what is best just below that price. The program's slots round every block's bytes up,
    which adds up over long chains; prices need no rounding, and lose at most one block's step between two options
    where the turn from forward to backward is what limits memory (Everett 1963).
    """
    def at(price: float) -> ChainSchedule:
        return tuple(Block(position, _best_at(link.options, price)) for position, link in enumerate(links))

    def fits(schedule: ChainSchedule) -> bool:
        return replay(links, schedule, head).peak <= budget

    prices = [0.0, *sorted({(low.seconds - high.seconds) / (high.kept - low.kept)
                            for options in dict.fromkeys(link.options for link in links)
                            for low in options for high in options
                            if low.kept < high.kept and low.seconds > high.seconds})]
    above = _first(len(prices), lambda k: fits(at(prices[k] * (1 + 1e-9))))
    if above == len(prices):
        return None
    best, dearer = at(prices[above] * (1 + 1e-9)), at(prices[above] * (1 - 1e-9))
    many = _first(len(links), lambda k: not fits((*dearer[:k + 1], *best[k + 1:])))
    return (*dearer[:many], *best[many:])


def _best_at(options: Sequence[Option], price: float) -> int:
    return min(range(len(options)), key=lambda which: (options[which].seconds + price * options[which].kept,
                                                       options[which].backward_peak))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first number below `count` for which something holds that, once it does, goes on to; else `count`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _best(links: Sequence[Link], head: int, budget: int, slots: int) -> ChainSchedule | None:
    floor = min(min(link.before, link.behind) for link in links)
    room = budget - floor
    if room <= 0 or head > budget:
        return None
    slots = max(200, min(slots, 12_000_000 // (len(links) + 1) ** 2))
    best: tuple[float, ChainSchedule] | None = None
    for cap in _caps(links):
        allowed = [[option for option in link.options if option.forward_peak <= limit]
                   for link, limit in zip(links, cap, strict=True)]
        found = _solve(links, allowed, cap, head - floor, room, floor, slots)
        if found is not None and (best is None or found[0] < best[0] - 1e-12):
            best = found
    return None if best is None else best[1]


def _caps(links: Sequence[Link]) -> list[list[int]]:
    """Limits on the forward peak, one list per attempt.

    A forward pass that keeps nothing runs by the option that its recomputation will use, and needs that option's
    memory. The program does not know that option yet, so it takes the limit for it and only allows options below.
    """
    levels = []
    for level in (1.0, 0.5, 0.0):
        caps = []
        for link in links:
            needs = sorted({option.forward_peak for option in link.options})
            caps.append(needs[round(level * (len(needs) - 1))])
        levels.append(caps)
    return list(map(list, dict.fromkeys(map(tuple, levels))))


def _solve(links: Sequence[Link], allowed: list[list[Option]], cap: list[int], head: int, room: int, floor: int,
           slots: int) -> tuple[float, ChainSchedule] | None:
    unit = room / slots

    def up(count: float) -> int:
        return min(int(np.ceil(count / unit - 1e-9)), slots + 1)

    n, most = len(links), max(map(len, allowed))
    kept, ahead, back, back_again = (np.full((n, most), slots + 1, dtype=np.int64) for _ in range(4))
    seconds = np.zeros((n, most))
    later = _fresh_after(links, n)
    for index, (link, options) in enumerate(zip(links, allowed, strict=True)):
        for which, option in enumerate(options):
            kept[index, which], seconds[index, which] = up(option.kept), option.seconds
            ahead[index, which] = up(option.forward_peak + link.before - floor)
            back[index, which] = up(option.backward_peak + link.behind - floor)
            back_again[index, which] = up(option.backward_peak + link.behind + later[index] - floor)
    again = [links[max(t - 1, 0)].behind + links[max(t - 1, 0)].arriving - floor for t in range(n + 1)]
    extra = np.full((n, n + 1, most), slots + 1, dtype=np.int64)
    for index, options in enumerate(allowed):
        peaks = np.array([option.forward_peak for option in options], dtype=np.int64)
        extra[index, :, :len(options)] = _slots(peaks[None, :] + np.array(again)[:, None], unit, slots)
    pass_ahead = np.array([up(cap[i] + link.before - floor) for i, link in enumerate(links)])
    pass_behind = _slots(np.array(cap)[:, None] + np.array(again)[None, :], unit, slots)
    inputs = np.array([up(link.input) for link in links] + [0])
    cost, choice = _program(n, slots, kept, ahead, back, back_again, seconds, extra, pass_ahead, pass_behind, inputs,
                            np.array([link.seconds for link in links]), np.array([link.cut for link in links]),
                            up(head))
    start = slots - inputs[0]
    if start < 0 or not np.isfinite(cost[0, n + 1, start]):
        return None
    names = [[link.options.index(option) for option in options] for link, options in zip(links, allowed, strict=True)]
    return float(cost[0, n + 1, start]), _read(choice, 0, n + 1, start, kept, inputs, names)


def _slots(counts: np.ndarray, unit: float, slots: int) -> np.ndarray:
    """Numbers of bytes in slots of `unit` bytes, rounded up; one more than there are for what never fits."""
    return np.minimum(np.ceil(counts / unit - 1e-9), slots + 1).astype(np.int64)


def _fresh_after(links: Sequence[Link], end: int) -> list[int]:
    """For every block, bytes of other arguments that are first given to a block after it and before `end`."""
    found = [0] * (len(links) + 1)
    for position in range(end - 2, -1, -1):
        found[position] = found[position + 1] + links[position + 1].fresh
    return found


@compiled()
def _program(n, slots, kept, ahead, back, back_again, seconds, extra, pass_ahead, pass_behind, inputs, forward, cut,
             head):
    """Least seconds for every part of the chain and every amount of memory, and the choices that lead to them.

    cost[s, t, m] for t <= n: seconds to recompute the forward of blocks s to t-1, in a segment that ends there, and run
    their backward, with m slots beside what is kept for blocks before s and the input of s. For t = n + 1: the same for
    blocks s to the last in their first forward, followed by the head. choice: an option, or -(j + 1) for a segment that
    ends before j.
    """
    cost = np.full((n + 1, n + 2, slots + 1), np.inf, dtype=np.float32)
    choice = np.full((n + 1, n + 2, slots + 1), 0, dtype=np.int16)
    for t in range(n + 1):
        cost[t, t, :] = 0.0
    cost[n, n + 1, min(head, slots + 1):] = 0.0
    for length in range(1, n + 1):
        for s in range(0, n - length + 1):
            _fill(s, s + length, n, slots, kept, extra[:, s + length].copy(), back_again, seconds,
                  pass_behind[:, s + length].copy(), inputs, forward, cut, cost, choice)
    for s in range(n - 1, -1, -1):
        _fill(s, n + 1, n, slots, kept, ahead, back, seconds, pass_ahead, inputs, forward, cut, cost, choice)
    return cost, choice


@compiled()
def _fill(s, t, n, slots, kept, ahead, back, seconds, passing, inputs, forward, cut, cost, choice):
    """Fill in cost[s, t] and its choice; `ahead` and `passing` are needs of the forward, `back` of the backward.

    All arrays are contiguous for every caller; other layouts would be compiled separately.
    """
    first, end = t > n, min(t, n)
    handed = inputs[s + 1] if s + 1 < end else 0
    for which in range(kept.shape[1]):
        need, taken = max(ahead[s, which], back[s, which]), kept[s, which] + handed
        for m in range(max(need, taken), slots + 1):
            found = cost[s + 1, t, m - taken] + seconds[s, which]
            if found < cost[s, t, m]:
                cost[s, t, m] = found
                choice[s, t, m] = which
    again, need = forward[s], passing[s]
    for j in range(s + 2, end + first):
        if cut[j - 1]:
            break
        again += forward[j - 1]
        need = max(need, inputs[j - 1] + passing[j - 1])
        handed = inputs[j] if j < end else 0
        for m in range(max(need, handed), slots + 1):
            found = again + cost[j, t, m - handed] + cost[s, j, m]
            if found < cost[s, t, m]:
                cost[s, t, m] = found
                choice[s, t, m] = -(j + 1)


def _read(choice: np.ndarray, s: int, t: int, m: int, kept: np.ndarray, inputs: np.ndarray,
          names: list[list[int]]) -> ChainSchedule:
    items: list[Block | Segment] = []
    end = min(t, len(names))
    while s < end:
        which = int(choice[s, t, m])
        if which >= 0:
            items.append(Block(s, names[s][which]))
            m -= int(kept[s, which]) + (int(inputs[s + 1]) if s + 1 < end else 0)
            s += 1
        else:
            j = -which - 1
            items.append(Segment(s, j, _read(choice, s, j, m, kept, inputs, names)))
            m -= int(inputs[j]) if j < end else 0
            s = j
    return tuple(items)


def replay(links: Sequence[Link], schedule: ChainSchedule, head: int) -> Replay:
    """Exact bytes of a schedule at every moment, and the seconds it recomputes."""
    result = Replay()
    _run(links, schedule, links[0].input if links else 0, None, head, result)
    return result


def _run(links: Sequence[Link], items: ChainSchedule, held: int, end: int | None, head: int, result: Replay,
         outer: int | None = None) -> None:
    """Replay items forward, then the head if this is the first pass, then items backward.

    Args:
        links: the blocks.
        items: what to replay.
        held: bytes kept so far, the first input included.
        end: end of the segment being recomputed; None for the first pass.
        head: see `solve_chain`.
        result: collects the moments and seconds.
        outer: end of the segment that encloses this one, if any.
    """
    last = items[-1] if items else None
    behind = end is not None
    later = _fresh_after(links, outer) if behind else [0] * len(links)

    def others(position: int) -> int:
        return links[end - 1].behind + links[end - 1].arriving if behind else links[position].before

    levels = []
    for item in items:
        levels.append(held)
        first, stop = (item.position, item.position + 1) if isinstance(item, Block) else (item.first, item.last)
        for position, option in leaves(item):
            block = links[position].options[option]
            passing = links[position].input if position > first else 0
            result.moments.append(("forward", position, held + passing + others(position) + block.forward_peak))
        if isinstance(item, Block):
            held += links[first].options[item.option].kept
        if item is not last:
            held += links[stop].input
    if not behind:
        result.moments.append(("head", len(links), held + head))
    for item, level in zip(reversed(items), reversed(levels), strict=True):
        if isinstance(item, Block):
            option = links[item.position].options[item.option]
            others_then = links[item.position].behind + later[item.position]
            result.moments.append(("backward", item.position, level + others_then + option.backward_peak))
            result.seconds += option.seconds
        else:
            result.seconds += sum(links[position].seconds for position in range(item.first, item.last))
            _run(links, item.inside, level, item.last, head, result, item.last if outer is None else outer)


def leaves(item: Block | Segment) -> list[tuple[int, int]]:
    """Positions and options of the blocks in an item, in order."""
    if isinstance(item, Block):
        return [(item.position, item.option)]
    return [leaf for part in item.inside for leaf in leaves(part)]


def segments_in(items: ChainSchedule) -> int:
    """Number of segments, nested ones included."""
    return sum(1 + segments_in(item.inside) for item in items if isinstance(item, Segment))


def _spend(links: Sequence[Link], schedule: ChainSchedule, head: int, budget: int) -> ChainSchedule:
    """Use what rounding left over: switch blocks to cheaper options while the exact peak stays within the budget."""
    best = replay(links, schedule, head)
    for position, _ in [leaf for item in schedule for leaf in leaves(item)]:
        ways = links[position].options
        for which in sorted(range(len(ways)), key=lambda which: ways[which].seconds):
            trial = with_option(schedule, position, which)
            found = replay(links, trial, head)
            if found.seconds >= best.seconds:
                break
            if found.peak <= budget:
                schedule, best = trial, found
                break
    return schedule


def with_option(items: ChainSchedule, position: int, which: int) -> ChainSchedule:
    """The schedule with another option for the block at one position."""
    return tuple(
        Block(position, which) if isinstance(item, Block) and item.position == position else
        Segment(item.first, item.last, with_option(item.inside, position, which))
        if isinstance(item, Segment) and item.first <= position < item.last else item for item in items)

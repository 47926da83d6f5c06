"""The master problem against every schedule there is, on small chains."""

import random
from itertools import product

import pytest

from strategies.rematerialization.solve.chain_program import Block, Link, Option, Segment, replay, solve_chain
from strategies.rematerialization.solve.keep_frontier import Kept, least_total


def chain(seed: int, count: int, even: bool) -> tuple[list[Link], int]:
    """Random blocks, and the bytes of what comes after them; `even`: all options of a block need the same forward."""
    draw = random.Random(seed)
    links = []
    for position in range(count):
        ways, handed, seconds = [], draw.randint(5, 30), draw.uniform(0.5, 2)
        forward = handed + draw.randint(20, 80)
        for which, kept in enumerate(sorted(draw.sample(range(0, 100), 2), reverse=True)):
            ahead = max(forward, 100) if even else max(kept, draw.randint(20, 100)) + handed
            ways.append(Option(kept, ahead, kept + draw.randint(0, 60), which * draw.uniform(0.1, 1.0)))
        links.append(Link(tuple(ways), handed, seconds, 100 + draw.randint(0, 10), 100 + draw.randint(0, 10), handed,
                          cut=position > 0 and draw.random() < 0.2))
    return links, 100 + draw.randint(0, 60) * draw.choice((1, 4))  # at times the loss needs more than all blocks


def items(links, first: int, last: int, whole: bool):
    """Every way to run blocks `first` to `last`; `whole`: in one segment as well.

    Segments have two blocks at least: that one block keeps only its input is one of its options.
    """
    if first == last:
        yield ()
        return
    for stop in range(first + 1, last + 1):
        heads = [Block(first, which) for which in range(len(links[first].options))] if stop == first + 1 else []
        crossing = any(links[inside].cut for inside in range(first + 1, stop))
        if stop > first + 1 and (whole or stop < last) and not crossing:
            heads += [Segment(first, stop, inside) for inside in items(links, first, stop, False)]
        tails = list(items(links, stop, last, whole))
        yield from ((head, *tail) for head in heads for tail in tails)


@pytest.mark.parametrize("seed", range(12))
def test_against_every_schedule(seed):
    even = seed % 2 == 0
    links, head = chain(seed, 2 + seed % 3, even)
    known = [(found.peak, found.seconds) for found in
             (replay(links, schedule, head) for schedule in items(links, 0, len(links), True))]
    least, most = min(peak for peak, _ in known), max(peak for peak, _ in known)

    def best(budget: float) -> float:
        return min((seconds for peak, seconds in known if peak <= budget), default=float("inf"))

    for budget in (least - 1, *range(least, most + 2, max(1, (most - least) // 12))):
        schedule = solve_chain(links, head, budget)
        rounding = budget * (2 * len(links) + 2) / 2000
        if schedule is None:
            assert best(budget - rounding) == float("inf") or not even, budget
            continue
        found = replay(links, schedule, head)
        assert found.peak <= budget
        assert found.seconds >= best(budget) - 1e-6
        if even:  # with unlike forwards the options that a pass may be followed by are narrowed to three choices
            assert found.seconds <= best(budget - rounding) + 1e-6, (budget, schedule)


@pytest.mark.parametrize("seed", range(20))
def test_bound_is_never_above_the_best_choice(seed):
    """Blocks keep some of their bytes and their output, or are inside a segment and keep nothing."""
    draw = random.Random(seed)
    blocks, choices = [], []
    for _ in range(4):
        kept = sorted(draw.sample(range(1, 60), draw.randint(1, 5)))
        points = list(zip(kept, sorted((draw.uniform(0, 10) for _ in kept), reverse=True), strict=True))
        handed, again = draw.randint(0, 9), draw.uniform(5, 20)
        prices = sorted({0.0, *(draw.uniform(0, 1) for _ in range(5))})
        lines = tuple((price, min(seconds + price * count for count, seconds in points)) for price in prices)
        blocks.append(Kept(lines, handed, again))
        choices.append([*((count + handed, seconds) for count, seconds in points), (0, again)])
    for room in range(0, 240, 7):
        sums = [sum(seconds for _, seconds in choice) for choice in product(*choices)
                if sum(count for count, _ in choice) <= room]
        assert least_total(blocks, room) <= min(sums, default=float("inf")) + 1e-9
    assert least_total(blocks * 8, 8 * 120) == pytest.approx(8 * least_total(blocks, 120))


@pytest.mark.parametrize("count", [12, 40])
def test_long_chains_of_equal_blocks_come_close_to_the_bound(count):
    """Rounding every block's bytes up to a slot must not add up: all but one block do what is best at one price."""
    points = [(1000, 0.0), (731, 1.0), (402, 3.0), (57, 9.0)]
    ways = tuple(Option(kept, 1100, kept + 100, seconds) for kept, seconds in points)
    links = [Link(ways, 10, 30.0, 0, 0, 10) for _ in range(count)]
    prices = {(low[1] - high[1]) / (high[0] - low[0]) for low in points for high in points if low[0] < high[0]}
    lines = tuple((price, min(seconds + price * kept for kept, seconds in points)) for price in sorted({0.0, *prices}))
    for share in (0.3, 0.5, 0.8):
        budget = 2000 + int(share * 1000 * count)
        found = replay(links, solve_chain(links, 1500, budget), 1500)
        bound = least_total([Kept(lines, 10, 30.0)] * (count - 1) + [Kept(lines, 0, 30.0)], budget - 1500 - 10)
        assert bound <= found.seconds <= bound + 6.0

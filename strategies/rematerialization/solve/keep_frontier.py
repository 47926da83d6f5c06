"""What keeping fewer bytes at one moment costs at least: a convex lower bound, and the orders at its corners.

For a price per byte, the cheapest sum of recomputation and bytes kept at the moment is a program without a limit on
memory, which HiGHS solves at its root for most graphs. Every price gives a line that no order lies below (Lagrangian
duality; Everett 1963); the prices at which the line turns are found corner by corner, as in Eisner and Severance 1976.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from strategies.rematerialization.solve.graph import Graph
from strategies.rematerialization.solve.lower_bound import TOLERANCE
from strategies.rematerialization.solve.order import unroll
from strategies.rematerialization.solve.relaxation import ALWAYS, NEVER, Program, program

NODES = 200  # of a branch and bound, a limit on work and not on time, so that two processes find the same
SOLVES = 48  # programs at most
LONGEST = 60.0  # seconds for all of them; only a program whose linear relaxation HiGHS hardly solves takes so long
FINE = 2e-3  # of the cost at the fewest bytes: a corner that lies less below the line between two others is left out


@dataclass(frozen=True, eq=False)
class Frontier:
    """Recomputation as a function of the bytes kept.

    Attributes:
        orders: orders at the corners, fewest bytes first.
        lines: (price, level) by rising price in seconds a byte: no order has less than `level` seconds beyond running
            everything once plus `price` times the bytes it keeps.
        whole: whether it took less than the time limit. What did not may be better elsewhere.
    """

    orders: tuple[tuple[int, ...], ...]
    lines: tuple[tuple[float, float], ...]
    whole: bool = True


@dataclass(frozen=True, eq=False)
class _Corner:
    kept: float
    seconds: float
    order: tuple[int, ...]


def keep_frontier(graph: Graph, moment: int) -> Frontier:
    """The frontier of bytes resident at the first run of `moment` against seconds.

    Bytes are those of values made before the moment that stay for reads after it, without what the moment itself reads
    and makes, and without fixed bytes. No other moment limits memory.
    """
    return _Search(graph, moment).run()


class _Search:
    def __init__(self, graph: Graph, moment: int) -> None:
        everything = int(graph.fixed + graph.size.sum() + graph.workspace.max(initial=0)) + 1
        self.graph, self.moment = graph, moment
        self.deadline = time.perf_counter() + LONGEST
        self.program: Program = program(graph, everything, [moment])
        self.once = float(np.sum(graph.seconds))
        self.bytes = np.zeros(self.program.cost.size)
        self.always = 0.0
        own = {*graph.reads[moment], *graph.makes[moment]}
        for value, column in enumerate(self.program.keep[1]):
            if column == ALWAYS and value not in own:
                self.always += float(graph.size[value])
            elif column not in (ALWAYS, NEVER):
                self.bytes[column] = float(graph.size[value])
        self.lines: list[tuple[float, float]] = []  # (price of a byte, least seconds + price * bytes)
        self.corners: list[_Corner] = []

    def run(self) -> Frontier:
        most = self.always + float(self.bytes.sum())
        if not self.bytes.sum() or not self.program.cost.max(initial=0.0):
            return Frontier((tuple(range(len(self.graph.seconds))),), ((0.0, 0.0),))
        fewest = self.fewest()
        if fewest.kept >= most:  # every value with bytes has to stay
            return Frontier((tuple(range(len(self.graph.seconds))),), ((0.0, 0.0),))
        free = _Corner(most, 0.0, tuple(range(len(self.graph.seconds))))
        self.corners = [fewest, free]
        open_ = [(fewest, free)]
        while open_ and len(self.lines) < SOLVES and self.left():
            # the widest triangle first, so that the limit on programs leaves out the least
            open_.sort(key=lambda pair: (pair[0].seconds - pair[1].seconds) * (pair[1].kept - pair[0].kept))
            left, right = open_.pop()
            price = (left.seconds - right.seconds) / (right.kept - left.kept)
            level = right.seconds + price * right.kept
            found, least = self.at(price)
            if least is None:  # without it the others' lines hold as they are
                continue
            self.lines.append((price, least))
            if found is not None and left.kept < found.kept < right.kept and level - (
                    found.seconds + price * found.kept) > FINE * fewest.seconds:
                self.corners.append(found)
                open_ += [pair for pair in ((left, found), (found, right)) if pair[0].seconds > pair[1].seconds]
        orders = tuple(corner.order for corner in sorted(self.corners, key=lambda one: one.kept))
        return Frontier(orders, tuple(sorted([(0.0, 0.0), *self.lines])), self.left() > 0)

    def fewest(self) -> _Corner:
        """The cheapest order found of those with the fewest bytes."""
        weight = 1e-4 * float(self.bytes[self.bytes > 0].min()) / float(self.program.cost.sum())
        answer = replace(self.program, cost=self.bytes + weight * self.program.cost).solve(self.left(), nodes=NODES)
        return self.corner(np.ones(self.program.cost.size) if answer.x is None else answer.x)

    def left(self) -> float:
        """Seconds left."""
        return max(0.0, self.deadline - time.perf_counter())

    def at(self, price: float) -> tuple[_Corner | None, float | None]:
        """The best order at a price, and the least of seconds + price * bytes, as proven; None where it is not found.

        A linear relaxation that is not solved in time proves nothing.
        """
        answer = replace(self.program, cost=self.program.cost + price * self.bytes).solve(self.left(), nodes=NODES)
        found = answer.mip_dual_bound
        if found is None or not np.isfinite(found):
            return None, None
        least = self.program.constant - self.once + price * self.always + found - TOLERANCE * abs(found)
        return None if answer.x is None else self.corner(answer.x), least

    def corner(self, solution: np.ndarray) -> _Corner:
        """Bytes and seconds of a solution (columns,) of the program."""
        seconds = self.program.constant - self.once + float(self.program.cost @ np.round(solution))
        kept = self.always + float(self.bytes @ np.round(solution))
        return _Corner(kept, seconds, unroll(self.graph, [self.moment], self.program.kept(solution)))


@dataclass(frozen=True)
class Kept:
    """What is known of a block that keeps some of its bytes or, in a recomputed segment, none.

    Attributes:
        lines: see `Frontier`.
        handed: bytes of its output, which are kept unless the block is inside a segment.
        again: seconds that the block costs inside a segment at least: those of its whole forward.
    """

    lines: tuple[tuple[float, float], ...]
    handed: int
    again: float


def least_total(blocks: Sequence[Kept], room: int) -> float:
    """Proven lower bound on the seconds of recomputation of blocks that keep at most `room` bytes together.

    That is the Lagrangian dual: at any price of a byte, each block on its own does what is cheapest for it. A block's
    least as a function of the price is concave, so that it is not below the chords between prices that were solved for.
    """
    counted: dict[Kept, int] = {}
    for block in blocks:
        counted[block] = counted.get(block, 0) + 1
    prices = np.unique([price for block in counted for price, _ in block.lines])
    total = -prices * room
    for block, count in counted.items():
        known, levels = np.array(block.lines).T
        total += count * np.minimum(np.interp(prices, known, levels) + prices * block.handed, block.again)
    return max(0.0, float(total.max(initial=0.0)))

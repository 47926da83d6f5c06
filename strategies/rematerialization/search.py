"""Simulated annealing over orders of operations, compiled: any operation may run again any number of times.

The state is the order itself, first runs in the graph's order with reruns between them, so that what is resident
follows from it. A move takes reruns out or puts some in, right before the read they serve; one backward pass over the
order then gives cost and peak and drops the reruns nobody reads any more. The pass takes some microseconds for a few
hundred operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba
import numpy as np

from strategies.rematerialization.graph import Graph, simulate

ROOM = 8  # an order holds at most this many runs per operation on average
BURST = 0.03  # seconds of annealing between two looks at the clock
COOLING = 1e-3  # last temperature over first
DEAREST = 100  # highest price of a byte over first; a higher one would freeze the search at low excess
compiled = numba.njit(cache=True, nogil=True, boundscheck=False)


class Arrays(NamedTuple):
    """A `Graph` as arrays: `reads[read_start[o]:read_start[o + 1]]` are the values operation o reads, and so on."""

    cost: np.ndarray
    read_start: np.ndarray
    reads: np.ndarray
    make_start: np.ndarray
    makes: np.ndarray
    user_start: np.ndarray
    users: np.ndarray
    maker: np.ndarray
    size: np.ndarray
    workspace: np.ndarray
    once: np.ndarray
    held: np.ndarray
    fixed: int


def arrays(graph: Graph) -> Arrays:
    """The graph as the arrays compiled code works on; reads are without repeats."""
    reads = [tuple(sorted(set(read))) for read in graph.reads]
    users: list[list[int]] = [[] for _ in graph.maker]
    for operation, read in enumerate(reads):
        for value in read:
            users[value].append(operation)
    flags = np.zeros(len(graph.seconds), np.uint8), np.zeros(len(graph.maker), np.uint8)
    flags[0][list(graph.once)] = 1
    flags[1][list(graph.held)] = 1
    return Arrays(np.asarray(graph.seconds, np.float64), *_rows(reads), *_rows(graph.makes), *_rows(users),
                  np.asarray(graph.maker, np.int64), np.asarray(graph.size, np.int64),
                  np.asarray(graph.workspace, np.int64), *flags, int(graph.fixed))


def _rows(lists) -> tuple[np.ndarray, np.ndarray]:
    start = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return start, np.array([item for row in lists for item in row], np.int64)


@compiled
def draw(state):
    """Next number in [0, 1) of xorshift64*; `state` is a (1,) uint64 array, so that threads do not share it."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def sweep(g, source, begin, mark, depth, budget, price, spread, limit, live, target, pending, state):
    """Run `source[begin:]` backward with the marked changes, write what is left to the end of `target`.

    A rerun of operation o is written o + operations. `mark[p]` is 0, -1 to take out the run at p, or v + 1 to put in
    a rerun that makes value v right before p; with chance `depth` the same is done for every value that rerun reads
    and that would otherwise have to stay for it alone.

    Returns (start in target, cost of reruns, peak, excess), where excess is the bytes of the peak over `budget` plus
    `spread` times those of every run; start 0 says that cost + price * excess is over `limit`, or the order too long.
    """
    operations = g.cost.size
    live[:] = g.held
    now = g.fixed
    for value in range(live.size):
        if live[value]:
            now += g.size[value]
    write, extra, peak, over = target.size, 0.0, 0, 0.0
    for position in range(source.size - 1, begin - 1, -1):
        waiting = 0
        code = source[position]
        if mark[position] == -1:
            continue
        inserting = False
        while True:
            operation = code if code < operations else code - operations
            again = code >= operations
            needed = not again
            peak_here = now + g.workspace[operation]
            freed = 0
            for k in range(g.make_start[operation], g.make_start[operation + 1]):
                value = g.makes[k]
                if again and g.held[value]:
                    peak_here += g.size[value]
                elif live[value]:
                    needed = True
                    freed += g.size[value]
                else:
                    peak_here += g.size[value]
            if needed:
                if write == 1:
                    return 0, 0.0, 0, 0.0
                for k in range(g.make_start[operation], g.make_start[operation + 1]):
                    value = g.makes[k]
                    if not (again and g.held[value]):
                        live[value] = 0
                now -= freed
                for k in range(g.read_start[operation], g.read_start[operation + 1]):
                    value = g.reads[k]
                    if not live[value]:
                        live[value] = 1
                        now += g.size[value]
                        peak_here += g.size[value]
                        if (inserting and waiting < pending.size and not g.once[g.maker[value]]
                                and not g.held[value] and draw(state) < depth):
                            pending[waiting] = g.maker[value]
                            waiting += 1
                write -= 1
                target[write] = code
                peak = max(peak, peak_here)
                over += max(0, peak_here - budget)
                if again:
                    extra += g.cost[operation]
                if extra + price * (max(0, peak - budget) + spread * over) > limit:
                    return 0, 0.0, 0, 0.0
            if mark[position] > 0 and not inserting:
                inserting = True
                pending[0] = g.maker[mark[position] - 1]
                waiting = 1
            if waiting == 0:
                break
            latest = 0  # reruns of one chain in the graph's order, so going backward the latest comes first
            for k in range(1, waiting):
                if pending[k] > pending[latest]:
                    latest = k
            code = pending[latest] + operations
            waiting -= 1
            pending[latest] = pending[waiting]
    return write, extra, peak, max(0, peak - budget) + spread * over


@compiled
def across(g, order, begin, position, live, next_read):
    """Values resident at `position` that are read only later: sets `next_read` and returns how many there are.

    `live` becomes 1 for exactly these. Held values and values of operations that run once are left out, as no rerun
    could free them.
    """
    operations = g.cost.size
    live[:] = 0
    count = 0
    for p in range(order.size - 1, position, -1):
        operation = order[p] % operations
        for k in range(g.make_start[operation], g.make_start[operation + 1]):
            if live[g.makes[k]]:
                live[g.makes[k]] = 0
                count -= 1
        for k in range(g.read_start[operation], g.read_start[operation + 1]):
            value = g.reads[k]
            if not live[value] and not g.once[g.maker[value]] and not g.held[value] and g.size[value] > 0:
                live[value] = 1
                count += 1
            next_read[value] = p
    return count


@compiled
def next_use(g, order, value, position):
    """First position from `position` on that reads `value`, -1 when it is made anew before or never read."""
    operations = g.cost.size
    for p in range(position, order.size):
        operation = order[p] % operations
        for k in range(g.read_start[operation], g.read_start[operation + 1]):
            if g.reads[k] == value:
                return p
        if operation == g.maker[value]:
            return -1
    return -1


@compiled
def put_in(g, order, begin, position, live, next_read, mark, state):
    """Mark a rerun of a random value resident across `position`, right before its next read."""
    count = across(g, order, begin, position, live, next_read)
    if count == 0:
        return
    chosen = int(draw(state) * count)
    for value in range(live.size):
        if live[value]:
            if chosen == 0:
                mark[next_read[value]] = value + 1
                return
            chosen -= 1


@compiled
def random_rerun(order, begin, operations, state):
    """A random position that holds a rerun, -1 if there is none."""
    length = order.size - begin
    at = int(draw(state) * length)
    for k in range(length):
        p = begin + (at + k) % length
        if order[p] >= operations:
            return p
    return -1


@compiled
def slide(g, order, begin, p, mark, state):
    """Take out the rerun at p and mark one of an operation before or after it in the graph instead."""
    operations = g.cost.size
    operation = order[p] - operations
    mark[p] = -1
    reads = g.read_start[operation + 1] - g.read_start[operation]
    makes = g.makes[g.make_start[operation]:g.make_start[operation + 1]]
    if draw(state) < 0.5 and reads > 0:
        value = g.reads[g.read_start[operation] + int(draw(state) * reads)]
    else:
        made = makes[int(draw(state) * makes.size)]
        users = g.user_start[made + 1] - g.user_start[made]
        if users == 0:
            return
        user = g.users[g.user_start[made] + int(draw(state) * users)]
        outputs = g.make_start[user + 1] - g.make_start[user]
        if outputs == 0:
            return
        value = g.makes[g.make_start[user] + int(draw(state) * outputs)]
    if g.once[g.maker[value]] or g.held[value]:
        return
    q = next_use(g, order, value, p + 1)
    if q >= 0 and mark[q] == 0:
        for k in range(p, begin - 1, -1):  # it must have run before
            if order[k] == g.maker[value]:
                mark[q] = value + 1
                return


@compiled
def propose(g, order, begin, live, next_read, mark, state):
    """Mark a random move; returns the depth of its chains."""
    operations = g.cost.size
    mark[begin:] = 0
    kind = draw(state)
    if kind < 0.75:
        put_in(g, order, begin, begin + int(draw(state) * (order.size - begin)), live, next_read, mark, state)
    if kind < 0.2 or 0.6 < kind < 0.68:
        put_in(g, order, begin, begin + int(draw(state) * (order.size - begin)), live, next_read, mark, state)
    if kind > 0.45:
        p = random_rerun(order, begin, operations, state)
        if p >= 0 and mark[p] == 0:
            if kind < 0.6 or kind > 0.85:
                slide(g, order, begin, p, mark, state)
            else:
                mark[p] = -1
    chance = draw(state)
    return 0.0 if chance < 0.4 else (1.0 if chance < 0.7 else draw(state))


@compiled
def anneal(g, order, begin, best, best_begin, best_figure, budget, least, iterations, hot, cold, price, highest, spread,
           state):
    """`iterations` moves at temperatures from `hot` to `cold` on cost of reruns + price * excess (see `sweep`).

    `order[begin:]` is the present order and `best[best_begin:]` the best, by its peak if `least`, else by its cost
    among those that fit; `best` changes in place. The price follows what it takes to fit about half of the time.
    Returns (order, begin, best_begin, best_figure, price).
    """
    values = g.size.size
    live, next_read = np.zeros(values, np.uint8), np.zeros(values, np.int64)
    pending, mark = np.zeros(64, np.int64), np.zeros(order.size, np.int64)
    other = np.zeros_like(order)
    score, now_extra, now_excess, feasible, depth = np.inf, 0.0, 0.0, 0, 0.0
    for iteration in range(iterations):
        temperature = hot * (cold / hot) ** (iteration / iterations)
        limit = score - temperature * np.log(1.0 - draw(state))
        start, extra, peak, excess = sweep(g, order, begin, mark, depth, budget, price, spread, limit, live, other,
                                           pending, state)
        if start > 0:
            order, other, begin = other, order, start
            score, now_extra, now_excess = extra + price * excess, extra, excess
            figure = float(peak) if least else (extra if excess == 0.0 else np.inf)
            if figure < best_figure:
                best_figure, best_begin = figure, start
                best[start:] = order[start:]
        feasible += now_excess == 0.0
        if iteration % 64 == 63:
            price = min(highest, price * 1.05) if feasible < 32 else price * 0.95
            score, feasible = now_extra + price * now_excess, 0
        depth = propose(g, order, begin, live, next_read, mark, state)
    return order, begin, best_begin, best_figure, price


class Searcher:
    """Annealing towards the cheapest order that fits `budget`, or, if `least`, towards the least peak.

    Attributes:
        order: the best order so far, None if nothing fits yet.
        figure: its cost of reruns, or its peak if `least`; infinite if nothing fits yet.
    """

    def __init__(self, graph: Graph, budget: int, seed: int = 0, least: bool = False):
        self.graph, self.budget, self.seed, self.least = graph, budget, seed, least
        self.arrays = arrays(graph)
        self.operations = len(graph.seconds)
        self.room = ROOM * self.operations + 64
        self.state = np.array([(seed + 1) * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
        self.once = float(np.sum(graph.seconds))
        self.hot = 3 * max(self.once, 1e-30) / self.operations
        self.price = max(self.once, 1e-30) / max(1.0, float(self.arrays.size.sum()))
        self.highest = DEAREST * self.price
        self.figure, self.order = np.inf, None
        self.rate = 1e5  # moves a second, measured as it goes

    def offer(self, order: Sequence[int]) -> float:
        """Take `order` for the best if it is; returns its cost with overshoot at the present price."""
        outcome = simulate(self.graph, order)
        figure = float(outcome.peak) if self.least else outcome.seconds - self.once
        if figure < self.figure and (self.least or outcome.peak <= self.budget):
            self.figure, self.order = figure, tuple(map(int, order))
        return outcome.seconds + self.price * max(0, outcome.peak - self.budget)

    @property
    def cost(self) -> float:
        """Cost of the best order; infinite if nothing fits yet."""
        return self.once + self.figure

    def round(self, order: Sequence[int], hot: float, spread: float, deadline: float, iterations: int | None = None,
              enough: Callable[[], bool] = lambda: False) -> None:
        """Anneal from `order` until `deadline` or for `iterations`, unless there is `enough` before.

        Args:
            hot: first temperature, in thrice the mean cost of an operation.
            spread: weight of the bytes over budget summed over runs, in an operation's share of them.
        """
        present, begin = self._coded(order)
        best, best_begin, before = np.zeros_like(present), 0, self.figure
        began, done = time.perf_counter(), 0
        length = max(deadline - began, 1e-9)
        left = iterations
        while (left is None or left > 0) and not enough():
            burst = max(50, int(self.rate * BURST)) if left is None else min(left, 20_000)
            passed = (time.perf_counter() - began) / length if left is None else 1 - left / iterations
            if passed >= 1:
                break
            ahead = min(1.0, passed + (burst / self.rate / length if left is None else burst / iterations))
            present, begin, best_begin, self.figure, self.price = anneal(
                self.arrays, present, begin, best, best_begin, self.figure, self.budget, self.least, burst,
                self.hot * hot * COOLING**passed, self.hot * hot * COOLING**ahead, self.price, self.highest,
                spread / self.operations, self.state)
            done += burst
            if left is None:
                self.rate = done / (time.perf_counter() - began)
            else:
                left -= burst
        if self.figure < before:
            self.order = tuple(int(code) % self.operations for code in best[best_begin:])

    def _coded(self, order: Sequence[int]) -> tuple[np.ndarray, int]:
        seen: set[int] = set()
        codes = np.zeros(max(self.room, len(order) + 64), np.int64)
        begin = len(codes) - len(order)
        for position, operation in enumerate(order):
            codes[begin + position] = operation + self.operations * (operation in seen)
            seen.add(operation)
        return codes, begin

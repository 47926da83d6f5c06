"""Simulated annealing over execution orders, compiled by numba: any operation may be rerun any number of times.

The state is the order itself, with first runs in the graph's order and reruns between them; the resident values follow
from it. A move removes reruns or inserts some right before the reads they serve. Going through the order backwards
gives its cost and peak, and drops reruns that are no longer read. The state known at every `STRIDE`th position lets a
move be evaluated only from the last position it touches down to where nothing differs any more, which takes a few
microseconds whatever the length of the order.

An order is stored at the end of its array, from `begin` on: entry o is the first run of operation o, and entry
o + operations a rerun of it.
"""

from __future__ import annotations

import numpy as np

from strategies.rematerialization.solve.annealing_moves import (
    STRIDE,
    compiled,
    copy,
    draw,
    ending,
    known_behind,
    propose,
    step_back,
    weigh,
)


@compiled
def look(g, order, begin, end, budget, known):
    """Bring `known` up to date for `order[begin:]`, where nothing has changed from `end` (a slot's first position) on.

    Returns (cost of reruns, peak, summed excess).
    """
    operations = g.cost.size
    slot = end // STRIDE
    if end >= order.size:
        slot = order.size // STRIDE + 1
        known.now[slot] = ending(g, known.live[slot])
        known.peak[slot], known.over[slot], known.extra[slot] = 0, 0.0, 0.0
    live = known.live[0]  # scratch space: no order begins at position 0, so that slot 0 is otherwise unused
    copy(known.live[slot], live)
    now, peak, over, extra = known.now[slot], known.peak[slot], known.over[slot], known.extra[slot]
    highest = 0
    for position in range(min(end, order.size) - 1, begin - 1, -1):
        code = order[position]
        again = code >= operations
        operation = code - operations if again else code
        here, freed, _ = weigh(g, operation, again, live, now)
        fetched = step_back(g, operation, again, live)
        now, here = now - freed + fetched, here + fetched
        highest, peak = max(highest, here), max(peak, here)
        over += max(0, here - budget)
        if again:
            extra += g.cost[operation]
        if position % STRIDE == 0 or position == begin:
            slot = position // STRIDE
            known.highest[slot], highest = highest, 0
            if position % STRIDE == 0:
                copy(live, known.live[slot])
                known.now[slot], known.peak[slot] = now, peak
                known.over[slot], known.extra[slot] = over, extra
    highest = 0
    for slot in range(begin // STRIDE, order.size // STRIDE + 2):
        known.before[slot] = highest
        highest = max(highest, known.highest[slot])
    return extra, peak, over


@compiled
def alike(one, other):
    """Whether two arrays are equal."""
    for k in range(one.size):  # noqa: SIM110, compiled
        if one[k] != other[k]:
            return False
    return True


@compiled
def ask_for(g, operation, live, depth, pending, waiting, state):
    """Add makers of a rerun's inputs that are not read later to `pending`, with chance `depth`; returns its length."""
    for k in range(g.read_start[operation], g.read_start[operation + 1]):
        value = g.reads[k]
        if (not live[value] and waiting < pending.size and not g.once[g.maker[value]] and not g.held[value]
                and draw(state) < depth):
            pending[waiting] = g.maker[value]
            waiting += 1
    return waiting


@compiled
def judge(g, order, begin, known, total, mark, low, high, depth, budget, price, spread, limit, live, window, pending,
          state):
    """Evaluate the order with the changes marked between positions `low` and `high`.

    `mark[p]` is 0, -1 to remove the run at p, or v + 1 to insert a rerun that makes value v right before p. With chance
    `depth`, each value which that rerun reads, and which would otherwise have to stay for it alone, is recomputed too.

    Args:
        total: the present order's (cost of reruns, peak, summed excess).
        limit: highest acceptable cost + price * excess, where excess is the bytes of the peak over `budget` plus
            `spread` times the bytes over budget summed over all runs.

    Returns:
        (number of runs written to the end of `window`, first and end of the positions that they replace, cost of
        reruns, peak, summed excess); -1 runs if the limit is exceeded.
    """
    operations = g.cost.size
    slot, end = known_behind(order, high)
    copy(known.live[slot], live)
    now, peak, over, extra = known.now[slot], known.peak[slot], known.over[slot], known.extra[slot]
    write = window.size
    for position in range(end - 1, begin - 1, -1):
        if mark[position] != -1:
            waiting, inserting, code = 0, False, order[position]
            while True:
                again = code >= operations
                operation = code - operations if again else code
                here, freed, wanted = weigh(g, operation, again, live, now)
                if wanted or not again:
                    if write == 0:
                        return -1, 0, 0, 0.0, 0, 0.0
                    if inserting:
                        waiting = ask_for(g, operation, live, depth, pending, waiting, state)
                    fetched = step_back(g, operation, again, live)
                    now, here = now - freed + fetched, here + fetched
                    write -= 1
                    window[write] = code
                    peak = max(peak, here)
                    over += max(0, here - budget)
                    if again:
                        extra += g.cost[operation]
                    if extra + price * (max(0, peak - budget) + spread * over) > limit:
                        return -1, 0, 0, 0.0, 0, 0.0
                if mark[position] > 0 and not inserting:
                    inserting = True
                    pending[0] = g.maker[mark[position] - 1]
                    waiting = 1
                if waiting == 0:
                    break
                latest = 0  # dependent reruns go in the graph's order, so going backward the latest comes first
                for k in range(1, waiting):
                    if pending[k] > pending[latest]:
                        latest = k
                code = pending[latest] + operations
                waiting -= 1
                pending[latest] = pending[waiting]
        if position <= low and position % STRIDE == 0 and position > begin:
            slot = position // STRIDE
            if now == known.now[slot] and alike(live, known.live[slot]):
                extra += total[0] - known.extra[slot]
                over += total[2] - known.over[slot]
                peak = max(peak, known.before[slot])
                if extra + price * (max(0, peak - budget) + spread * over) > limit:
                    return -1, 0, 0, 0.0, 0, 0.0
                return window.size - write, position, end, extra, peak, over
    return window.size - write, begin, end, extra, peak, over


@compiled
def take(order, begin, window, runs, stop, end):
    """Replace `order[stop:end]` by the last `runs` entries of the window; returns the new begin, 0 for lack of room."""
    shift = end - stop - runs
    if begin + shift < 1:
        return 0
    if shift > 0:
        for position in range(stop - 1, begin - 1, -1):
            order[position + shift] = order[position]
    elif shift < 0:
        for position in range(begin, stop):
            order[position + shift] = order[position]
    for k in range(runs):
        order[end - runs + k] = window[window.size - runs + k]
    return begin + shift


@compiled
def remember(order, begin, total, budget, least, best, best_begin, best_figure):
    """Copy the order to `best` if it is better; returns the begin of the best order and its figure."""
    figure = float(total[1]) if least else (total[0] if total[1] <= budget else np.inf)
    if figure >= best_figure:
        return best_begin, best_figure
    for position in range(begin, order.size):
        best[position] = order[position]
    return begin, figure


@compiled
def anneal(g, order, begin, known, best, best_begin, best_figure, budget, least, iterations, hot, cold, price, highest,
           spread, state):
    """Run `iterations` moves at temperatures from `hot` to `cold` on cost of reruns + price * excess (see `judge`).

    `order[begin:]` is the present order and `best[best_begin:]` the best, by its peak if `least`, else by its cost
    among those that fit; both are modified in place. The price adapts so that the order fits about half of the time.
    Returns (begin, best_begin, best_figure, price).
    """
    live, window = np.zeros(g.size.size, np.uint8), np.zeros_like(order)
    pending, mark, places = np.zeros(64, np.int64), np.zeros(order.size, np.int64), np.zeros(4, np.int64)
    total = look(g, order, begin, order.size, budget, known)
    excess = max(0, total[1] - budget) + spread * total[2]
    score, feasible = total[0] + price * excess, 0
    temperature = hot
    best_begin, best_figure = remember(order, begin, total, budget, least, best, best_begin, best_figure)
    for iteration in range(iterations):
        feasible += excess == 0.0
        if iteration % 64 == 63:
            price = min(highest, price * 1.05) if feasible < 32 else price * 0.95
            score, feasible = total[0] + price * excess, 0
            temperature = hot * (cold / hot) ** (iteration / iterations)
        depth = propose(g, order, begin, known, live, mark, places, state)
        high, low = places[0], order.size
        for place in places:
            if place >= 0:
                low, high = min(low, place), max(high, place)
        if high < 0:
            continue
        limit = score - temperature * np.log(1.0 - draw(state))
        runs, stop, end, extra, peak, over = judge(
            g, order, begin, known, total, mark, low, high, depth, budget, price, spread, limit, live, window, pending,
            state)
        for place in places:
            if place >= 0:
                mark[place] = 0
        moved = take(order, begin, window, runs, stop, end) if runs >= 0 else 0
        if moved:
            begin = moved
            total = look(g, order, begin, end, budget, known)
            excess = max(0, total[1] - budget) + spread * total[2]
            score = total[0] + price * excess
            best_begin, best_figure = remember(order, begin, total, budget, least, best, best_begin, best_figure)
    return begin, best_begin, best_figure, price

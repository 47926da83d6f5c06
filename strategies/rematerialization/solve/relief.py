"""A greedy start for the search: drop what saves most bytes above the budget for the least recomputation.

Between two reads of a value it can be dropped and made again right before the second. What that saves is summed over
the positions at which more than the budget is resident, less what inputs add that have to stay longer for it. The drop
that saves most per second is taken until everything fits, as DTR (Kirisame et al. 2021) evicts, but with a view of the
whole order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.rematerialization.solve.annealing_moves import Arrays, compiled


def relieve(g: Arrays, start: Sequence[int], budget: int, room: int) -> tuple[int, ...]:
    """An order of at most `room` runs made from `start`, in which less exceeds `budget` bytes, or nothing."""
    order = np.zeros(max(room, len(start)), np.int64)
    order[:len(start)] = start
    length = _relieve(g, order, len(start), budget)
    return tuple(int(operation) for operation in order[:length])


@compiled
def _relieve(g, order, length, budget):
    """Insert reruns into `order[:length]` until it fits; returns its new length, even if nothing helps any more."""
    count, values = g.cost.size, g.size.size
    most = 1  # values that one run makes
    for operation in range(count):
        most = max(most, g.make_start[operation + 1] - g.make_start[operation])
    copies = order.size * most + values
    start, last = np.zeros(copies, np.int64), np.zeros(copies, np.int64)
    resident, ran = np.zeros(order.size + 1, np.int64), np.zeros(count, np.uint8)
    current = np.zeros(values, np.int64)
    chain, best_chain = np.zeros(64, np.int64), np.zeros(64, np.int64)
    banned, which = np.zeros(values, np.uint8), 0
    before, runs, place = np.iinfo(np.int64).max, 0, 0
    while True:
        _lay_out(g, order, length, current, start, last, resident, ran)
        total = 0
        for position in range(length):
            total += max(0, resident[position] - budget)
        if total == 0:
            return length
        if total < before:
            before = total
            banned[:] = 0
        else:  # the last drop was no gain: its reruns need more than it saved
            length -= runs
            for position in range(place, length):
                order[position] = order[position + runs]
            banned[which] = 1
            _lay_out(g, order, length, current, start, last, resident, ran)
        runs, place, which = _best_drop(g, order, length, budget, current, start, last, resident, ran, banned, chain,
                                        best_chain)
        if runs == 0 or length + runs > order.size:
            return length
        for position in range(length - 1, place - 1, -1):
            order[position + runs] = order[position]
        for k in range(runs):
            order[place + k] = best_chain[k]
        length += runs


@compiled
def _lay_out(g, order, length, current, start, last, resident, ran):
    """Number the copies of values, note their first and last positions, and add up what is resident."""
    copies = 0
    current[:] = -1
    ran[:] = 0
    resident[:] = 0
    for position in range(length):
        operation = order[position]
        resident[position] += g.fixed + g.workspace[operation]
        for k in range(g.read_start[operation], g.read_start[operation + 1]):
            last[current[g.reads[k]]] = position
        for k in range(g.make_start[operation], g.make_start[operation + 1]):
            value = g.makes[k]
            if g.held[value] and ran[operation]:
                resident[position] += g.size[value]
                continue
            current[value] = copies
            start[copies] = last[copies] = position
            copies += 1
        ran[operation] = 1
    current[:] = -1
    ran[:] = 0
    copies = 0
    change = np.zeros(length + 1, np.int64)
    for position in range(length):
        operation = order[position]
        for k in range(g.make_start[operation], g.make_start[operation + 1]):
            value = g.makes[k]
            if g.held[value] and ran[operation]:
                continue
            change[position] += g.size[value]
            change[length if g.held[value] else last[copies] + 1] -= g.size[value]
            copies += 1
        ran[operation] = 1
    now = 0
    for position in range(length):
        now += change[position]
        resident[position] += now


@compiled
def _best_drop(g, order, length, budget, current, start, last, resident, ran, banned, chain, best_chain):
    """The drop that saves most excess per second: (reruns written to `best_chain`, position they go before, value)."""
    short = np.zeros(length + 1, np.int64)  # positions above the budget before each
    for position in range(length):
        short[position + 1] = short[position] + (resident[position] > budget)
    used = np.zeros(current.size, np.int64)
    current[:] = -1
    ran[:] = 0
    copies, best, best_runs, best_place, best_value = 0, 0.0, 0, 0, 0
    for position in range(length):
        operation = order[position]
        for k in range(g.read_start[operation], g.read_start[operation + 1]):
            value = g.reads[k]
            since = used[value]
            if g.movable[value] and not banned[value] and position > since + 1 and short[position] > short[since + 1]:
                beside = resident[position]  # about what is resident while a rerun runs right before
                for m in range(g.make_start[operation], g.make_start[operation + 1]):
                    beside -= g.size[g.makes[m]]
                saved = 0
                for p in range(since + 1, position):
                    if resident[p] > budget:
                        saved += min(g.size[value], resident[p] - budget)
                for deep in range(3):
                    runs, cost, added = _price(g, g.maker[value], position, deep, budget, current, last, resident,
                                               chain)
                    added += runs * max(0, beside - budget)
                    if runs and saved > added:
                        rate = (saved - added) / max(cost, 1e-12)
                        if rate > best:
                            best, best_runs, best_place, best_value = rate, runs, position, value
                            for r in range(runs):
                                best_chain[r] = chain[r]
            used[value] = position
        for k in range(g.make_start[operation], g.make_start[operation + 1]):
            value = g.makes[k]
            if g.held[value] and ran[operation]:
                continue
            current[value] = copies
            used[value] = position
            copies += 1
        ran[operation] = 1
    return best_runs, best_place, best_value


@compiled
def _price(g, maker, position, deep, budget, current, last, resident, chain):
    """What running `maker` again before a position takes: (runs written to `chain`, cost, excess added).

    Inputs that are gone by then stay until it (`deep` 0), or are made again from what stays (1) or from what is there
    anyway (2).
    """
    cost, added, runs, done = g.cost[maker], 0, 1, 0
    chain[0] = maker
    while done < runs:
        operation = chain[done]
        for k in range(g.read_start[operation], g.read_start[operation + 1]):
            value = g.reads[k]
            until = last[current[value]]
            if g.held[value] or until >= position:
                continue
            if g.movable[value] and (deep == 2 or (deep == 1 and done == 0)):
                again, there = g.maker[value], False
                for r in range(runs):
                    there = there or chain[r] == again
                if not there:
                    if runs == chain.size:
                        return 0, 0.0, 0
                    chain[runs] = again
                    runs += 1
                    cost += g.cost[again]
            else:
                added += _excess(g.size[value], until + 1, position, budget, resident)
        done += 1
    for k in range(1, runs):  # into the graph's order
        one, place = chain[k], k
        while place > 0 and chain[place - 1] > one:
            chain[place] = chain[place - 1]
            place -= 1
        chain[place] = one
    return runs, cost, added


@compiled
def _excess(size, begin, end, budget, resident):
    """What a value of `size` bytes adds to the summed excess if it stays from `begin` to `end`."""
    added = 0
    for p in range(begin, end):
        over = resident[p] + size - budget
        if over > 0:
            added += min(size, over)
    return added

"""Random moves of the annealing, and its data: the graph and the known state of the order as arrays for numba."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from strategies.common.compiled import compiled as on_disk

STRIDE = 8
compiled = on_disk(boundscheck=False)
inlined = on_disk(boundscheck=False, inline="always")  # a call would double the cost


class Arrays(NamedTuple):
    """A `Graph` as arrays: `reads[read_start[o]:read_start[o + 1]]` are the values that operation o reads, and so on.

    `movable` values are those that can be recomputed: their maker may run again, they are not held, and have bytes.
    """

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
    movable: np.ndarray
    fixed: int


class Known(NamedTuple):
    """What is known about the present order, for slots of `STRIDE` positions.

    Going backwards, `live[s]`, `now[s]`, `peak[s]`, `over[s]` and `extra[s]` are the resident values, their bytes, the
    peak so far, the summed excess and the cost of reruns once all positions from `s * STRIDE` on have been processed.
    `highest[s]` is the peak within slot s, and `before[s]` the peak of all slots before it.
    """

    live: np.ndarray
    now: np.ndarray
    peak: np.ndarray
    over: np.ndarray
    extra: np.ndarray
    highest: np.ndarray
    before: np.ndarray


def nothing_known(room: int, values: int) -> Known:
    """Arrays for an order of at most `room` runs, all zero."""
    slots = room // STRIDE + 2
    return Known(np.zeros((slots, values), np.uint8), *(np.zeros(slots, kind) for kind in (
        np.int64, np.int64, np.float64, np.float64, np.int64, np.int64)))


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
def ending(g, live):
    """Mark in `live` the values resident at the end; returns their bytes."""
    now = g.fixed
    for value in range(live.size):
        live[value] = g.held[value]
        if g.held[value]:
            now += g.size[value]
    return now


@inlined
def copy(source, into):
    """Copy an array into another, item by item: slice assignment would add numba's error text, seconds to compile."""
    for k in range(source.size):
        into[k] = source[k]


@compiled
def known_behind(order, position):
    """The first slot after `position`, at whose first position the resident values are known.

    Returns (slot, its first position, at most the order's end).
    """
    slot = position // STRIDE + 1
    end = slot * STRIDE
    return (slot, end) if end < order.size else (order.size // STRIDE + 1, order.size)


@inlined
def weigh(g, operation, again, live, now):
    """Bytes while an operation runs, without its inputs; bytes of its outputs read later; whether any of them is."""
    here, freed, wanted = now + g.workspace[operation], 0, False
    for k in range(g.make_start[operation], g.make_start[operation + 1]):
        value = g.makes[k]
        if again and g.held[value]:
            here += g.size[value]
        elif live[value]:
            wanted = True
            freed += g.size[value]
        else:
            here += g.size[value]
    return here, freed, wanted


@inlined
def step_back(g, operation, again, live):
    """Make `live` what is resident before an operation; returns the bytes of its inputs that are not read later."""
    for k in range(g.make_start[operation], g.make_start[operation + 1]):
        if not (again and g.held[g.makes[k]]):
            live[g.makes[k]] = 0
    fetched = 0
    for k in range(g.read_start[operation], g.read_start[operation + 1]):
        value = g.reads[k]
        if not live[value]:
            live[value] = 1
            fetched += g.size[value]
    return fetched


@compiled
def next_use(g, order, value, position):
    """First position from `position` on that reads `value`; -1 if it is recomputed before that or never read."""
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
def put_in(g, order, position, known, live, mark, state):
    """Mark a rerun of a random value resident across `position`, before its next read; returns where, -1 if nowhere."""
    operations = g.cost.size
    slot, end = known_behind(order, position)
    copy(known.live[slot], live)
    for p in range(end - 1, position, -1):
        step_back(g, order[p] % operations, order[p] >= operations, live)
    count = 0
    for value in range(live.size):
        count += live[value] & g.movable[value]
    if count == 0:
        return -1
    chosen = int(draw(state) * count)
    for value in range(live.size):
        if live[value] & g.movable[value]:
            if chosen == 0:
                p = next_use(g, order, value, position + 1)
                mark[p] = value + 1
                return p
            chosen -= 1
    return -1


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
    """Remove the rerun at p and mark one of a neighboring operation in the graph; returns where, or -1."""
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
            return -1
        user = g.users[g.user_start[made] + int(draw(state) * users)]
        outputs = g.make_start[user + 1] - g.make_start[user]
        if outputs == 0:
            return -1
        value = g.makes[g.make_start[user] + int(draw(state) * outputs)]
    if g.once[g.maker[value]] or g.held[value]:
        return -1
    q = next_use(g, order, value, p + 1)
    if q >= 0 and mark[q] == 0:
        for k in range(p, begin - 1, -1):  # its maker must have run before
            if order[k] == g.maker[value]:
                mark[q] = value + 1
                return q
    return -1


@compiled
def propose(g, order, begin, known, live, mark, places, state):
    """Mark a random move in up to four `places`, -1 for unused ones; returns `depth` (see `judge`)."""
    operations = g.cost.size
    for k in range(places.size):
        places[k] = -1
    kind = draw(state)
    if kind < 0.75:
        places[0] = put_in(g, order, begin + int(draw(state) * (order.size - begin)), known, live, mark, state)
    if kind < 0.2 or 0.6 < kind < 0.68:
        places[1] = put_in(g, order, begin + int(draw(state) * (order.size - begin)), known, live, mark, state)
    if kind > 0.45:
        p = random_rerun(order, begin, operations, state)
        if p >= 0 and mark[p] == 0:
            places[2] = p
            if kind < 0.6 or kind > 0.85:
                places[3] = slide(g, order, begin, p, mark, state)
            else:
                mark[p] = -1
    chance = draw(state)
    return 0.0 if chance < 0.4 else (1.0 if chance < 0.7 else draw(state))

"""Rematerialization baselines that need no solver: keep everything, checkpoint by a rule, or drop values greedily."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.order import without

Order = tuple[int, ...]


def keep_all(graph: Graph) -> Order:
    """Every operation once."""
    return tuple(range(len(graph.seconds)))


def chen_sqrt(graph: Graph) -> Order:
    """About sqrt(n) segments of equal length, keeping only what crosses their ends (Chen et al. 2016, section 4.2).

    On a graph that is not a chain, each end moves to the nearest articulation point within half a segment, if there is
    one, as in Checkmate's baselines (Jain et al. 2020, appendix B).
    """
    count = max(1, round(math.sqrt(graph.forward)))
    narrow = np.array(articulation_points(graph))
    ends = set()
    for end in np.linspace(0, graph.forward - 1, count + 1)[1:-1]:
        nearest = narrow[np.abs(narrow - end).argmin()] if len(narrow) else np.inf
        ends.add(int(nearest if abs(nearest - end) <= graph.forward / count / 2 else round(end)))
    return segments(graph, sorted(ends))


def per_block(graph: Graph, ends: Sequence[int] | None = None) -> Order:
    """Recompute every block as a whole: `ends` are the last forward operations of the blocks.

    Without `ends`, blocks end where a single value is passed on (articulation points).
    """
    return segments(graph, articulation_points(graph) if ends is None else ends)


def greedy(graph: Graph, budget: int) -> Order | None:
    """Drop forward values, those with the most bytes per second of recomputation first, until the order fits.

    Returns None if it does not fit with everything droppable dropped.
    """
    dropped: set[int] = set()
    worth = np.asarray(graph.size) / np.maximum(np.asarray(graph.seconds)[graph.maker], 1e-12)
    droppable = [value for value in np.argsort(-worth) if graph.maker[value] < graph.forward and graph.size[value] > 0
                 and graph.maker[value] not in graph.once and value not in graph.held]
    for value in [None, *droppable]:
        dropped |= set() if value is None else {int(value)}
        order = without(graph, dropped)
        if simulate(graph, order).peak <= budget:
            return order
    return None


def segments(graph: Graph, ends: Sequence[int]) -> Order:
    """Keep what passes from one segment of the forward to the next; recompute a segment as a whole when it is read.

    Args:
        graph: the operations.
        ends: the last operation of every segment but the last, increasing.
    """
    block = np.searchsorted(np.asarray(ends, dtype=int), np.arange(graph.forward))
    last = np.full(len(graph.maker), -1)
    for operation in range(graph.forward):
        last[list(graph.reads[operation])] = operation
    inside = {value for value, maker in enumerate(graph.maker) if maker < graph.forward and maker not in graph.once
              and value not in graph.held and (last[value] < 0 or block[last[value]] == block[maker])}
    return without(graph, inside, block)


def articulation_points(graph: Graph) -> list[int]:
    """Forward operations after which later forward operations read a single value (of those with bytes)."""
    last = np.array(graph.maker)
    for operation in range(graph.forward):
        for value in graph.reads[operation]:
            last[value] = max(last[value], operation)
    passing = np.zeros(graph.forward + 1, int)
    for value, maker in enumerate(graph.maker):
        if maker < last[value] and graph.size[value] and last[value] < graph.forward:
            passing[maker] += 1
            passing[last[value]] -= 1
    return [int(end) for end in np.flatnonzero(np.cumsum(passing) == 1) if end < graph.forward - 1]

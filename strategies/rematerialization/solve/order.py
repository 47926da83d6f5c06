"""From decisions about values to orders of operations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from strategies.rematerialization.solve.graph import Graph


def unroll(graph: Graph, moments: Sequence[int], kept: Sequence[Collection[int]]) -> tuple[int, ...]:
    """The order that keeps `kept[k]` through the first run of `moments[k]` and makes the rest anew when it is read.

    Between two moments everything made stays. First runs are in the graph's order.
    """
    order: list[int] = []
    makes = graph.makes
    ends = [*moments, len(graph.seconds) - 1]
    there: set[int] = set()
    for k, end in enumerate(ends):
        for operation in range(ends[k - 1] + 1 if k else 0, end + 1):
            _run(graph, makes, operation, there, order)
        if k < len(moments):
            there = {*kept[k], *makes[end]}
    return tuple(order)


def without(graph: Graph, dropped: Collection[int], block: np.ndarray | None = None) -> tuple[int, ...]:
    """Forward, then backward with `dropped` values made anew once, when they are first read.

    Args:
        block: (forward,) segment of every forward operation: what a segment lacks is made at once. Without it, every
            value is made when it is read.
    """
    makes, order = graph.makes, list(range(graph.forward))
    there = {value for value, maker in enumerate(graph.maker) if maker < graph.forward} - set(dropped)
    wanted: dict[int, list[int]] = {}  # dropped values the backward pass reads, by segment
    for value in sorted({value for read in graph.reads[graph.forward:] for value in read} & set(dropped)):
        if block is not None:
            wanted.setdefault(int(block[graph.maker[value]]), []).append(value)
    for operation in range(graph.forward, len(graph.seconds)):
        for value in graph.reads[operation]:
            if value not in there and block is not None:
                for other in wanted[int(block[graph.maker[value]])]:
                    if other not in there:
                        _run(graph, makes, int(graph.maker[other]), there, order)
        _run(graph, makes, operation, there, order)
    return tuple(order)


def _run(graph: Graph, makes: Sequence[Sequence[int]], operation: int, there: set[int], order: list[int]) -> None:
    """Append `operation`, after the operations that make what it reads and is not there."""
    stack, needed = [operation], set()
    while stack:
        one = stack.pop()
        if one not in needed:
            needed.add(one)
            stack += [int(graph.maker[value]) for value in graph.reads[one] if value not in there]
    for one in sorted(needed):
        order.append(one)
        there.update(makes[one])

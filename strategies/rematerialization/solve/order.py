"""Build execution orders from decisions about which values to keep or drop."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from strategies.rematerialization.solve.graph import Graph


def unroll(graph: Graph, moments: Sequence[int], kept: Sequence[Collection[int]]) -> tuple[int, ...]:
    """The order that keeps only `kept[k]` through the first run of `moments[k]` and recomputes other values when read.

    Between two moments everything that is made stays. First runs are in the graph's order.
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
    """Forward, then backward with each of the `dropped` values recomputed once, when it is first read.

    Args:
        graph: the operations.
        dropped: values not kept from forward to backward.
        block: (forward,) segment of every forward operation; all values that the backward needs of a segment are then
            recomputed at once. Without it, each value is recomputed when it is read.
    """
    makes, order = graph.makes, list(range(graph.forward))
    there = {value for value, maker in enumerate(graph.maker) if maker < graph.forward} - set(dropped)
    wanted: dict[int, list[int]] = {}  # dropped values that the backward reads, by segment
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
    """Append `operation`, preceded by the operations that make its missing inputs."""
    stack, needed = [operation], set()
    while stack:
        one = stack.pop()
        if one not in needed:
            needed.add(one)
            stack += [int(graph.maker[value]) for value in graph.reads[one] if value not in there]
    for one in sorted(needed):
        order.append(one)
        there.update(makes[one])

"""A second simulator of schedules, apart from the solver's own: what is resident is a set, followed step by step."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.rematerialization.solve.graph import Graph


def check(graph: Graph, order: Sequence[int]) -> tuple[float, int]:
    """Cost and peak of running operations in `order`, by the memory model of Checkmate (Jain et al. 2020, eq. 2-5).

    While an operation runs, what it reads, what it makes and its workspace are resident beside all values that are
    read later. A value goes after its last read before it is made anew.

    Raises:
        ValueError: an operation is missing, repeated though it must not be, or reads what is not resident.
    """
    makes = graph.makes
    if set(order) != set(range(len(graph.seconds))):
        raise ValueError("an operation never runs, or is none of the graph's")
    for operation in graph.once:
        if list(order).count(operation) > 1:
            raise ValueError(f"operation {operation} runs more than once")
    wanted = later_reads(graph, order)
    resident: set[int] = set()
    cost, peak, ran = 0.0, 0, set()
    for position, operation in enumerate(order):
        missing = set(graph.reads[operation]) - resident
        if missing:
            raise ValueError(f"operation {operation} at position {position} reads {sorted(missing)}, gone by then")
        again = {value for value in makes[operation] if value in graph.held and operation in ran}
        used = sum(int(graph.size[value]) for value in resident | set(makes[operation]))
        used += sum(int(graph.size[value]) for value in again) + int(graph.workspace[operation]) + int(graph.fixed)
        peak, cost = max(peak, used), cost + float(graph.seconds[operation])
        ran.add(operation)
        resident = {value for value in resident | set(makes[operation])
                    if value in graph.held or value in wanted[position]}
    return cost, peak


def later_reads(graph: Graph, order: Sequence[int]) -> list[set[int]]:
    """For every position, the values that a later one reads before they are made anew."""
    wanted: list[set[int]] = [set() for _ in order]
    needed: set[int] = set()
    for position in range(len(order) - 1, -1, -1):
        wanted[position] = set(needed)
        needed -= set(graph.makes[order[position]])
        needed |= set(graph.reads[order[position]])
    return wanted

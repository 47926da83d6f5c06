"""The rematerialization problem as plain data: a graph of operations and values, and a simulator of orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Graph:
    """Operations of a training step (forward, then backward) in a valid execution order, and the values they make.

    A value is a storage: views belong to the value they alias, and an operation may make several values. The memory
    model is that of Checkmate (Jain et al. 2020, eq. 2-5): while an operation runs, its inputs, all its outputs, its
    workspace and every value that is read later are resident.

    Attributes:
        seconds: (operations,) cost of running each operation once, in any unit.
        reads: for every operation, the values it reads.
        maker: (values,) operation that makes each value.
        size: (values,) bytes.
        workspace: (operations,) bytes needed while an operation runs, beyond its inputs and outputs. An operation with
            workspace but no cost or outputs marks a moment at which something else needs memory.
        once: operations that may run only once (inputs that arrive, values drawn at random or updated in place).
        held: values that stay resident from when they are first made until the end (gradients that are returned).
        forward: operations before this index are the forward pass.
        fixed: bytes that are always resident.
    """

    seconds: np.ndarray
    reads: tuple[tuple[int, ...], ...]
    maker: np.ndarray
    size: np.ndarray
    workspace: np.ndarray
    once: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    forward: int = 0
    fixed: int = 0

    @cached_property
    def makes(self) -> tuple[tuple[int, ...], ...]:
        """For every operation, the values it makes."""
        made: list[list[int]] = [[] for _ in self.seconds]
        for value, operation in enumerate(self.maker):
            made[operation].append(value)
        return tuple(map(tuple, made))


@dataclass(frozen=True)
class Outcome:
    """Cost and memory of an order: seconds in the graph's unit, peak bytes, and resident bytes at every position."""

    seconds: float
    peak: int
    resident: np.ndarray


def simulate(graph: Graph, order: Sequence[int]) -> Outcome:
    """Cost and memory of running operations in `order`, in which every repetition of an operation is a recomputation.

    Each run of an operation makes its values anew, and a read takes the newest copy. A copy is freed after its last
    read before the value is made again or the order ends; a copy that is never read is freed at once. Held values stay
    from their first run on.

    Raises:
        ValueError: the order misses an operation, reads a value that has not been made, or repeats an operation that
            may run only once.
    """
    _check(graph, order)
    makes = graph.makes
    change = np.zeros(len(order) + 1, dtype=np.int64)
    resident = np.array([graph.workspace[operation] for operation in order], dtype=np.int64) + graph.fixed
    made_at: dict[int, int] = {}
    last_read: dict[int, int] = {}

    def close(value: int) -> None:
        change[made_at[value]] += graph.size[value]
        change[last_read[value] + 1] -= graph.size[value]

    for position, operation in enumerate(order):
        for value in graph.reads[operation]:
            last_read[value] = position
        for value in makes[operation]:
            if value in made_at:
                if value in graph.held:  # the new copy lies beside the held one
                    resident[position] += graph.size[value]
                    continue
                close(value)
            made_at[value] = last_read[value] = position
    for value in made_at:
        if value in graph.held:
            last_read[value] = len(order) - 1
        close(value)
    resident += np.cumsum(change)[:-1]
    return Outcome(float(sum(graph.seconds[operation] for operation in order)), int(resident.max(initial=0)), resident)


def _check(graph: Graph, order: Sequence[int]) -> None:
    ran: set[int] = set()
    for position, operation in enumerate(order):
        if operation in ran and operation in graph.once:
            raise ValueError(f"operation {operation} at position {position} may run only once")
        for value in graph.reads[operation]:
            if graph.maker[value] not in ran:
                raise ValueError(f"operation {operation} at position {position} reads value {value}, not made yet")
        ran.add(operation)
    if len(ran) != len(graph.seconds):
        raise ValueError(f"operations {sorted(set(range(len(graph.seconds))) - ran)[:5]} never run")

"""Find the options for one block: ways to run it that trade bytes kept against recomputation."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from strategies.rematerialization.capture.joint_graph import Captured, is_random, problem
from strategies.rematerialization.capture.partition import state_like
from strategies.rematerialization.price.option_store import OptionStore
from strategies.rematerialization.solve.chain_program import Option
from strategies.rematerialization.solve.checkmate import check_size, optimal
from strategies.rematerialization.solve.graph import Graph, simulate
from strategies.rematerialization.solve.keep_frontier import Frontier, keep_frontier
from strategies.rematerialization.solve.lower_bound import Bound
from strategies.rematerialization.solve.relaxation import program
from strategies.rematerialization.solve.solver import Infeasible, least_peak, solve

LEVELS = (0.85, 0.7, 0.55, 0.42, 0.3, 0.2, 0.12, 0.06, 0.0)
"""Bytes kept by each option, as fractions of keeping everything; most of the gain lies where little is kept."""
MOVES = 8_000
REMEMBERED = 256  # most results kept in a process


Found = TypeVar("Found")
_known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


def _remembered(key: tuple[Any, ...], store: OptionStore | None, find: Callable[[], Found],
                write: Callable[[Found], list[Any]], read: Callable[[list[Any]], Found],
                final: Callable[[], bool] = lambda: True) -> Found:
    """The result of `find`, computed once per process, and only once overall if there is a `store` and it is `final`.

    A run plans the same blocks several times: before it begins and with its model, with one tile of the loss and
    another.
    """
    if key not in _known:
        kept = None if store is None else store.find(key)
        try:
            _known[key] = find() if kept is None else read(kept)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError):  # stored data in another format
            if kept is None:
                raise
            _known[key] = find()
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)
    if store is not None and final():
        store.keep(key, write(_known[key]))
    return _known[key]


def _key(what: str, captured: Captured, seconds: np.ndarray, workspace: np.ndarray, *more: object) -> tuple[Any, ...]:
    return what, captured.signature, seconds.tobytes(), workspace.tobytes(), LEVELS, *more


def options(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, moves: int = MOVES, solver: str = "auto",
            store: OptionStore | None = None) -> tuple[Option, ...]:
    """Ways to run a region that no other way beats in bytes kept, both peaks and seconds, cheapest first.

    For each amount of bytes kept, a MILP finds what to keep at the least cost; a search then lowers the backward's peak
    from there, step by step.

    Args:
        captured: the region.
        seconds, workspace: (operations,) prices of its operations.
        moves: number of moves of each search.
        solver: "auto", or "exact" to solve Checkmate's program after the searches.
        store: keeps results from one process to the next.

    Raises:
        NotExact: the exact program is too large, or was not solved to proven optimality in time.
    """
    def read(orders: list[Any]) -> tuple[Option, ...]:
        free = problem(captured, seconds, workspace)
        return tuple(option_of(captured, free, tuple(map(int, order))) for order in orders)

    find = {"auto": _options, "exact": _exact_options}[solver]
    return _remembered(_key("options", captured, seconds, workspace, moves, solver), store,
                       lambda: find(captured, seconds, workspace, moves),
                       lambda found: [list(option.order) for option in found], read)


def _exact_options(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, moves: int) -> tuple[Option, ...]:
    """The options that searches find, plus the exact program's solution for the bytes kept and the peak of each.

    Of two with the same needs the cheaper one stays: an order that the program cannot express can beat its optimum.
    """
    free = problem(captured, seconds, workspace)
    check_size("a block", len(free.seconds))
    found = list(_options(captured, seconds, workspace, moves))
    for option in tuple(found[1:]):  # the first one keeps everything
        peak, states = max(option.forward_peak, option.backward_peak), _state_bytes(captured, option.order)
        best = optimal(problem(captured, seconds, workspace, option.kept - states, peak - states), peak - states,
                       "a block")
        found += [option_of(captured, free, best.order)] if best.order is not None else []
    return frontier(found)


def _options(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, moves: int) -> tuple[Option, ...]:
    free = problem(captured, seconds, workspace)
    all_kept = option_of(captured, free, tuple(range(len(free.seconds))))
    most = 2 * (max(all_kept.backward_peak, all_kept.forward_peak) + all_kept.kept)
    least = least_peak(free, 30.0, iterations=12 * moves)  # limited by moves to be reproducible
    lowest = option_of(captured, free, least.order)
    found = [all_kept, lowest]
    for level in LEVELS:
        kept = int(level * all_kept.kept)
        cost, order = _cheapest(captured, seconds, workspace, kept, most)
        for peak in (most, *np.geomspace(max(least.peak, 1), all_kept.backward_peak, 4)[2::-1].astype(int)):
            order = _solved(captured, seconds, workspace, kept, int(peak), moves, order, cost)
            if order is None:
                break
            found.append(option_of(captured, free, order))
        if kept >= lowest.kept:  # near the lowest peak, at less cost than `lowest` where more may be kept
            order = _solved(captured, seconds, workspace, kept, int(1.01 * least.peak), moves, least.order, cost)
            found += [option_of(captured, free, order)] if order is not None else []
    found += [option_of(captured, free, order) for order in _kept_frontier(captured, seconds, workspace).orders]
    return frontier(found)


def cheapest_within(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, kept: int, peak: int,
                    moves: int = MOVES) -> tuple[int, ...] | None:
    """The order found that recomputes least, keeps at most `kept` bytes and peaks at `peak` bytes or less, or None."""
    cost, order = _cheapest(captured, seconds, workspace, kept, peak)
    return _solved(captured, seconds, workspace, kept, peak, moves, order, cost)


def _cheapest(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, kept: int, most: int
              ) -> tuple[float, Sequence[int] | None]:
    """The order with the least recomputation for the bytes kept, whatever its peak: a MILP with one moment.

    Returns:
        A lower bound on the cost of every order that keeps no more, infinite if there is none, and the MILP's order.
    """
    graph = problem(captured, seconds, workspace, kept, most)
    bound = Bound(graph, most)
    bound.prove(program(graph, most, [graph.forward]), time.perf_counter() + 0.5)
    return bound.value, bound.starts[-1] if bound.starts else None


def _solved(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, kept: int, peak: int, moves: int,
            start: Sequence[int] | None, least: float) -> tuple[int, ...] | None:
    """The cheapest order found from `start`; the search stops at the proven lower bound `least`."""
    graph = problem(captured, seconds, workspace, kept, peak)
    try:
        return solve(graph, peak, 0.5, bound=False, start=start, iterations=moves, least=least).order
    except Infeasible:
        return None


def option_of(captured: Captured, graph: Graph, order: Sequence[int]) -> Option:
    """The option of running a region in an order: bytes kept, peaks, and cost beyond running everything once."""
    border = list(order).index(captured.forward)
    resident = simulate(graph, order).resident
    again = len(order) > len(graph.seconds)
    extra = float(sum(graph.seconds[index] for index in order) - graph.seconds.sum()) if again else 0.0
    states = _state_bytes(captured, order)
    return Option(kept_bytes(graph, order) + states, int(resident[:border].max(initial=0)) + states,
                  int(resident[border + 1:].max(initial=0)) + states, max(0.0, extra), tuple(order))


def kept_bytes(graph: Graph, order: Sequence[int]) -> int:
    """Bytes of values made before the moment between forward and backward and read after it."""
    border = list(order).index(graph.forward)
    makes = graph.makes
    made, kept = set(makes[graph.forward]), set()
    for operation in order[border + 1:]:
        kept |= set(graph.reads[operation]) - made
        made |= set(makes[operation])
    return int(sum(graph.size[value] for value in kept))


def _state_bytes(captured: Captured, order: Sequence[int]) -> int:
    """Bytes of RNG states saved for random operations that are rerun."""
    shift = [index + (index >= captured.forward) for index in range(len(captured.operations))]
    ran = list(order)
    return sum(state_like(node).numel() for index, node in zip(shift, captured.operations, strict=True)
               if is_random(node) and ran.count(index) > 1)


def most_states(captured: Captured) -> int:
    """Bytes of RNG states if every random operation is rerun."""
    return sum(state_like(node).numel() for node in captured.operations if is_random(node))


def frontier(found: Sequence[Option]) -> tuple[Option, ...]:
    """Options that no other option equals or beats in every respect, cheapest first."""
    kept: list[Option] = []
    for option in sorted(found, key=lambda option: (option.seconds, option.kept, option.backward_peak)):
        if not any(other.kept <= option.kept and other.backward_peak <= option.backward_peak
                   and other.forward_peak <= option.forward_peak for other in kept):
            kept.append(option)
    return tuple(kept)


def keep_lines(captured: Captured, seconds: np.ndarray, workspace: np.ndarray, store: OptionStore | None = None
               ) -> tuple[tuple[float, float], ...]:
    """Proven lower bound on a region's recomputation for bytes kept, as lines (see `Frontier`).

    Bytes are those between forward and backward of what the region keeps, without its input and its output. This is a
    relaxation: peaks are not constrained.
    """
    return _remembered(_key("bounds", captured, seconds, workspace), store,
                       lambda: _kept_frontier(captured, seconds, workspace).lines,
                       lambda found: [[price, level] for price, level in found],
                       lambda kept: tuple((float(price), float(level)) for price, level in kept),
                       lambda: _is_whole(_key("frontier", captured, seconds, workspace)))


def _is_whole(key: tuple[Any, ...]) -> bool:
    """Whether no time limit has cut a frontier; one that comes from a store was not."""
    return key not in _known or _known[key].whole


def _kept_frontier(captured: Captured, seconds: np.ndarray, workspace: np.ndarray) -> Frontier:
    """The frontier of bytes kept between forward and backward, found once in a process."""
    key = _key("frontier", captured, seconds, workspace)
    if key not in _known:
        _known[key] = keep_frontier(problem(captured, seconds, workspace), captured.forward)
    return _known[key]

"""How far slow work has come, for whoever wants to show it: the code that works knows of no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(unit: str, done: int, total: int | None) -> None:
    """Tell the listener, if there is one, how much is done.

    Args:
        unit: what is counted, in the plural: "layers".
        total: how many there are; None where that is not known.
    """
    listener = _listener.get()
    if listener is not None:
        listener(unit, done, total)


def tracked(items: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items, and report before each how many are done, and at the end that all are.

    Args:
        total: how many items there are, if they have no length.
    """
    total, done = len(items) if isinstance(items, Sized) else total, 0
    for item in items:
        report(unit, done, total)
        yield item
        done += 1
    report(unit, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context manager in which reports go to `listener`, called with unit, done and total, and to no one else."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)

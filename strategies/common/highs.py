"""HiGHS through scipy, without the lines for its developers that some versions write to standard output."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from scipy.optimize import OptimizeResult, milp

_lock = threading.Lock()
_diverted = [0, -1]  # how many solve at this moment, and standard output as it was


def mixed_integer(cost, **program) -> OptimizeResult:
    """`scipy.optimize.milp`, from which nothing reaches standard output, where tables and JSON go."""
    with _output_on_stderr():
        return milp(cost, **program)


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """What native code, or another thread, writes to standard output meanwhile goes to standard error."""
    with _lock:
        _diverted[0] += 1
        if _diverted[0] == 1:
            _diverted[1] = _divert()
    try:
        yield
    finally:
        with _lock:
            _diverted[0] -= 1
            if _diverted[0] == 0 and _diverted[1] >= 0:
                _flush()
                os.dup2(_diverted[1], 1)
                os.close(_diverted[1])


def _divert() -> int:
    """Returns a copy of standard output, -1 if there is none."""
    _flush()
    try:
        saved = os.dup(1)
    except OSError:
        return -1
    os.dup2(2, 1)
    return saved


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # what C has buffered

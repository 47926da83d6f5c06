"""Solve MILPs with HiGHS through scipy, without the debug lines that some versions write to standard output."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import scipy  # whose `optimize` is imported when it is first used

_lock = threading.Lock()
_diverted = [0, -1]  # number of running solves, and a copy of the original standard output


def mixed_integer(cost, **program) -> scipy.optimize.OptimizeResult:
    """`scipy.optimize.milp` with nothing written to standard output, which is for tables and JSON."""
    with _output_on_stderr():
        return scipy.optimize.milp(cost, **program)


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Within the context, output of native code and other threads to standard output goes to standard error."""
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
    """Redirect standard output, and return a copy of its file descriptor, or -1 if there is none."""
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
    ctypes.CDLL(None).fflush(None)  # flush C's buffers

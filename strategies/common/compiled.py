"""Functions compiled by numba, kept on disk where that is possible."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
from numba.core.registry import CPUDispatcher


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator as `numba.njit(nogil=True, **options)`, whose machine code is kept on disk for later processes.

    numba keeps it beside the module, or else in the user's cache; where it can write to neither, it refuses to compile
    at all. Each process then compiles anew.

    Where LLVM may compute otherwise than is written (`fastmath`), compiled functions that are called must have
    `forceinline=True`. Else a process that compiles runs the callee's own machine code, and one that loads from disk
    the caller's copy of it, which is optimized otherwise: what is computed is rounded otherwise, and a run that goes on
    has other bits (numba 0.68).

    Raises:
        TypeError: with `fastmath` here or there, it calls a compiled function that is not inlined.
    """
    def decorated(function: Callable[..., Any]) -> Any:
        for name, called in _called(function):
            free = options.get("fastmath") or called.targetoptions.get("fastmath")
            if free and not called.targetoptions.get("forceinline"):
                raise TypeError(f"{function.__name__} calls {name}, which must be compiled with forceinline=True: else "
                                "what is computed depends on whether machine code comes from disk")
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)

    return decorated


def _called(function: Callable[..., Any]) -> list[tuple[str, CPUDispatcher]]:
    """Compiled functions among the names that a function reads."""
    read = inspect.getclosurevars(function)
    return [(name, value) for name, value in {**read.globals, **read.nonlocals}.items()
            if isinstance(value, CPUDispatcher)]

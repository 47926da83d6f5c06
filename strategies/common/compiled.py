"""Functions compiled by numba, kept on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator as `numba.njit(nogil=True, **options)`, whose machine code is kept on disk for later processes.

    numba keeps it beside the module, or else in the user's cache; where it can write to neither, it refuses to compile
    at all. Each process then compiles anew.
    """
    def decorated(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)

    return decorated

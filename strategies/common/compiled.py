"""Functions compiled by numba, kept on disk where that is possible; numba is imported when the first one is called."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

_ONE_AT_A_TIME = threading.RLock()  # of several threads that call a function first


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator as `numba.njit(nogil=True, **options)`, whose machine code is kept on disk for later processes.

    numba keeps it beside the module, or else in the user's cache; where it can write to neither, it refuses to compile
    at all. Each process then compiles anew.

    Where LLVM may compute otherwise than is written (`fastmath`), compiled functions that are called must have
    `forceinline=True`. Else a process that compiles runs the callee's own machine code, and one that loads from disk
    the caller's copy of it, which is optimized otherwise: what is computed is rounded otherwise, and a run that goes on
    has other bits (numba 0.68).

    Raises:
        TypeError: when it is first called: with `fastmath` here or there, it calls a compiled function that is not
            inlined.
    """
    return lambda function: Compiled(function, options)


class Compiled:
    """A function that becomes numba's when it is first called, which spares a process that calls none the import.

    numba finds what a function calls among the names that it reads, and knows only functions of its own there. So with
    a function, those that it calls become numba's, in the modules and closures where their names are read.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._found: Any = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.by_numba()(*arguments, **keywords)

    def by_numba(self) -> Any:
        """The function as numba has it."""
        with _ONE_AT_A_TIME:
            if self._found is None:
                self._call_by_numba()
                self._found = self._by_numba()
                names = self._function.__globals__
                if names.get(self._function.__name__) is self:  # later calls by this name need no detour
                    names[self._function.__name__] = self._found
        return self._found

    def _call_by_numba(self) -> None:
        """Put numba's functions where this one reads those that it calls."""
        names, code = self._function.__globals__, self._function.__code__
        for name in code.co_names:
            called = names.get(name)
            if called is not self and _is_compiled(called):
                names[name] = self._inlined(name, called)
        for name, cell in zip(code.co_freevars, self._function.__closure__ or (), strict=True):
            if _is_compiled(cell.cell_contents):
                cell.cell_contents = self._inlined(name, cell.cell_contents)

    def _inlined(self, name: str, called: Any) -> Any:
        found = called.by_numba() if isinstance(called, Compiled) else called
        free = self._options.get("fastmath") or found.targetoptions.get("fastmath")
        if free and not found.targetoptions.get("forceinline"):
            raise TypeError(f"{self._function.__name__} calls {name}, which must be compiled with forceinline=True: "
                            "else what is computed depends on whether machine code comes from disk")
        return found

    def _by_numba(self) -> Any:
        import numba

        try:
            return numba.njit(cache=True, nogil=True, **self._options)(self._function)
        except RuntimeError:
            return numba.njit(nogil=True, **self._options)(self._function)


def _is_compiled(value: Any) -> bool:
    """Whether a value is such a function, or what numba has made of one."""
    return isinstance(value, Compiled) or hasattr(value, "targetoptions")

"""Functions compiled by numba, kept on disk where that is possible; numba is imported when the first one is called."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

_ONE_AT_A_TIME = threading.RLock()  # of several threads that call a function first
_MADE: dict[Any, Compiled] = {}  # by what numba has made of them


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator as `numba.njit(nogil=True, **options)`, whose machine code is kept on disk for later processes.

    numba keeps it beside the module, or else in the user's cache; where it can write to neither, it refuses to compile
    at all. Each process then compiles anew. It also does where a file has changed that the function or one of those it
    calls is in; numba by itself looks at the function's own file alone.

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
        self._free = bool(options.get("fastmath"))  # whether any of its machine code may compute otherwise than written
        self._files = {function.__code__.co_filename}

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.by_numba()(*arguments, **keywords)

    def by_numba(self) -> Any:
        """The function as numba has it."""
        with _ONE_AT_A_TIME:
            if self._found is None:
                self._call_by_numba()
                self._found = self._by_numba()
                _MADE[self._found] = self
                names = self._function.__globals__
                if names.get(self._function.__name__) is self:  # later calls by this name need no detour
                    names[self._function.__name__] = self._found
        return self._found

    def _call_by_numba(self) -> None:
        """Put numba's functions where this one reads those that it calls."""
        names, code, called = self._function.__globals__, self._function.__code__, {}
        for name in code.co_names:
            one = _compiled_one(names.get(name))
            if one is not None and one is not self:
                names[name], called[name] = one.by_numba(), one
        for name, cell in zip(code.co_freevars, self._function.__closure__ or (), strict=True):
            one = _compiled_one(cell.cell_contents)
            if one is not None:
                cell.cell_contents, called[name] = one.by_numba(), one
        self._free = self._free or any(one._free for one in called.values())
        self._files = self._files.union(*(one._files for one in called.values()))
        for name, one in called.items() if self._free else ():
            if not one._options.get("forceinline"):
                raise TypeError(f"{self._function.__name__} calls {name}, which must be compiled with "
                                "forceinline=True: else what is computed depends on whether machine code comes from "
                                "disk")

    def _by_numba(self) -> Any:
        import numba

        try:
            found = numba.njit(cache=True, nogil=True, **self._options)(self._function)
        except RuntimeError:
            return numba.njit(nogil=True, **self._options)(self._function)
        kept = getattr(getattr(found, "_cache", None), "_cache_file", None)
        if kept is None:  # another version of numba, of which nothing is kept rather than something wrong
            return numba.njit(nogil=True, **self._options)(self._function)
        kept._source_stamp = kept._source_stamp, *(_stamp(file) for file in sorted(self._files))
        return found


def _stamp(file: str) -> tuple[str, int, int]:
    """Changes whenever a file does."""
    about = os.stat(file)
    return os.path.basename(file), about.st_mtime_ns, about.st_size


def _compiled_one(value: Any) -> Compiled | None:
    """The `Compiled` that a value is, or that numba has made it of."""
    if isinstance(value, Compiled):
        return value
    return _MADE.get(value) if type(value).__name__ == "CPUDispatcher" else None

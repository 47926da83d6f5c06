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
    """
    return lambda function: Compiled(function, options)


class Compiled:
    """A function that becomes numba's when it is first called, which spares a process that calls none the import.

    numba finds what a function calls among the globals of its module, and knows only functions of its own there. So
    with a function, those that it calls become numba's, in the modules where their names are read.
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
                names = self._function.__globals__
                for name in self._function.__code__.co_names:
                    if isinstance(called := names.get(name), Compiled) and called is not self:
                        names[name] = called.by_numba()
                self._found = self._by_numba()
                if names.get(self._function.__name__) is self:  # later calls by this name need no detour
                    names[self._function.__name__] = self._found
        return self._found

    def _by_numba(self) -> Any:
        import numba

        try:
            return numba.njit(cache=True, nogil=True, **self._options)(self._function)
        except RuntimeError:
            return numba.njit(nogil=True, **self._options)(self._function)

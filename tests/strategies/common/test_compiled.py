"""Compiled functions also where nothing can be kept on disk."""

import numba

from strategies.common.compiled import compiled


def test_a_function_is_compiled_where_nothing_can_be_kept(monkeypatch):
    njit = numba.njit

    def refuses(*given, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*given, **options)

    monkeypatch.setattr(numba, "njit", refuses)

    @compiled(error_model="numpy")
    def halved(number):
        return number / 2

    assert halved(3) == 1.5 and halved.signatures

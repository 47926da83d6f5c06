"""Compiled functions: where nothing can be kept on disk, and before one is called."""

import subprocess
import sys

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

    assert halved(3) == 1.5 and halved.by_numba().signatures


def test_numba_is_imported_with_the_first_call_and_functions_call_each_other():
    code = ("import sys; from strategies.rematerialization.solve import chain_program, solver\n"
            "assert 'numba' not in sys.modules\n"
            "from strategies.rematerialization.solve.chain_program import Link, Option, solve_chain\n"
            "option = Option(kept=4, forward_peak=8, backward_peak=8, seconds=0.0)\n"
            "solve_chain([Link((option,), 4, 1.0, 0, 0)], 0, 100)\n"
            "assert chain_program._program.signatures, chain_program._program")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

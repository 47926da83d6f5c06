"""Compiled functions: new and from disk they compute the same; where nothing can be kept; before one is called."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from strategies.common.compiled import compiled

ROOT = Path(__file__).parents[3]
FAST = {"fastmath": {"reassoc", "contract"}}


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


def test_what_may_be_rounded_otherwise_is_inlined():
    plain, fast, inlined = compiled(), compiled(**FAST), compiled(**FAST, forceinline=True)

    @plain
    def of_plain(x):
        return x * x

    @fast
    def of_fast(x):
        return x * x

    @inlined
    def of_inlined(x):
        return x * x + 1.0

    def calling(called):
        def caller(x):
            return called(x)

        return caller

    through = plain(calling(of_inlined))  # which holds what was inlined
    for decorator, called in ((fast, of_plain), (plain, of_fast), (fast, of_fast), (plain, through)):
        with pytest.raises(TypeError, match="caller calls called, which must be compiled with forceinline=True"):
            decorator(calling(called))(1.0)

    @fast
    def sums(x):
        return of_inlined(x) + of_inlined(x + 1.0)

    assert sums(2.0) == 15.0


def test_a_change_of_a_function_that_is_called_compiles_its_callers_anew(tmp_path):
    """numba looks at the caller's file alone."""
    (tmp_path / "caller.py").write_text(
        "from called import f\nfrom strategies.common.compiled import compiled\n\n\n@compiled()\ndef g(x):\n"
        "    return f(x) * 10\n\n\nprint(g(1), sum(g.stats.cache_hits.values()))\n")
    said = []
    for number in (1, 1, 2):
        (tmp_path / "called.py").write_text(
            "from strategies.common.compiled import compiled\n\n\n@compiled(forceinline=True)\ndef f(x):\n"
            f"    return x + {number}\n")
        os.utime(tmp_path / "called.py", ns=(number * 10**9,) * 2)
        done = subprocess.run([sys.executable, "caller.py"], capture_output=True, text=True, cwd=tmp_path, timeout=100,
                              env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept"), "PYTHONPATH": str(ROOT),
                                   "PYTHONDONTWRITEBYTECODE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.split())
    assert said == [["20", "0"], ["20", "1"], ["30", "0"]]


def test_a_process_that_compiles_has_the_bits_of_one_that_loads(tmp_path):
    """All kernels that may round otherwise: of losses, quantizers and optimizers."""
    digests = [_of_a_process(tmp_path) for _ in range(2)]
    files = sorted({path.name.split(".")[0] for path in tmp_path.rglob("*.nbi")})
    assert {"slope_kernels", "row_kernels", "kernels", "group_kernels"} <= set(files), "nothing was kept on disk"
    assert len(digests[0].split()) == 9 and digests[0] == digests[1]


def _of_a_process(cache: Path) -> str:
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


KERNELS = """
import hashlib
import numpy as np
from strategies.distillation.losses import row_kernels as rows, slope_kernels as slopes

def said(*arrays):
    print(hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())

single, chance = np.float32, np.random.default_rng(0)
student, teacher = (chance.standard_normal((8, 4099)).astype(single) for _ in range(2))
targets, asked = chance.integers(0, 4099, 8), np.ones(8, dtype=np.bool_)
text, shape = rows.Text(0.3, 0.1, 1e-3), rows.Shape(single(0.03), single(0.7))
for kind, first, second, share in (
        (slopes.REVERSE, 0, 1, 0), (slopes.MIXTURE, 0.5, 0.5, 0.5), (slopes.MIXTURE, 0, 1, 0.9),
        (slopes.VARIATION, 0, 0, 0), (None, 1, 0, 0)):
    kernel = rows.forward_kl_rows if kind is None else slopes.slope_rows
    taught = rows.Taught(kind or 0, single(first), single(second), single(share), single(1), 1.0)
    mine, theirs, values = student.copy(), teacher.copy(), np.zeros((8, 3))
    kernel(mine, theirs, asked, targets, 0, 8, text, taught, shape, values, True)
    said(mine, values)
mine, values = student.copy(), np.zeros((8, 3))
rows.text_rows(mine, targets, 0, 8, text, shape, values, True)
said(mine, values)

from strategies.optimizers import kernels

weight, gradient, mean, square = (chance.standard_normal(1003).astype(single) for _ in range(4))
square *= square
table = np.array([[array.ctypes.data for array in (weight, gradient, mean, square)] + [1003]])
kernels.lamb_step(table, np.array([[1.1, 1e-6, 0.01, 0.9, 0.999, 1e-3, np.inf]]), ratios := np.zeros(1))
said(weight, mean, square, ratios)
share, column = np.ones((1, 17), dtype=single), np.ones((1, 59), dtype=single)
said(np.array(kernels.adafactor_norms(weight.reshape(1, 17, 59), gradient.reshape(1, 17, 59), share, column, 1e-30)))

from strategies.quantization import group_kernels

bits, least, most = student.view(np.int32), np.zeros(8, dtype=np.int32), np.zeros(8, dtype=np.int32)
group_kernels._least_and_most(bits, least, most)
assert (least.view(single) == student.min(1)).all() and (most.view(single) == student.max(1)).all()
said(least, most)
"""

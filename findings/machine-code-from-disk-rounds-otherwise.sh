#!/usr/bin/env bash
# numba 0.68.1: a process that compiles a `cache=True` function and one that loads the same function from disk compute
# different float32 bits from the same input, where it is compiled with fastmath's "reassoc" and "contract" and calls
# another compiled function that LLVM does not inline. The library of the caller holds a copy of the callee, which was
# optimized once more. Where the callee was compiled in the same process, its own machine code runs; where only the caller
# was read from disk, the copy does. Two later processes agree with each other. With forceinline=True for the callee all
# processes agree. So the first run of a program and all later ones differ in their last bits.
# Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6
cat > "$folder/rows.py" <<'PY'
import hashlib
import sys

import numpy as np
from numba import njit

single = np.float32
written = {"cache": True, "fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}
free = {"cache": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


@njit(**written)
def growth(x):
    power = np.floor(x * single(1.44269504) + single(0.5))
    rest = x - power * single(0.69314718)
    series = rest * (rest * (rest * single(0.0416) + single(0.16666)) + single(0.5)) * rest + rest + single(1)
    return series * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32) - single(1)


@njit(**written)
def slope(d, a, b, s):
    g = growth(d)
    line = s * g * (single(1) - s * g * (single(0.5) - s * g * (single(0.3333) - s * g * single(0.25))))
    return (single(1) - s) * (b * s - a * (single(1) - s)) * g / (single(1) + s * g) - b * line


@njit(**free, forceinline=sys.argv[1] == "inlined")
def row(mine, other, top, a, b, s):
    total = 0.0
    for start in range(0, mine.size, 512):
        part, here, there = single(0), mine[start:start + 512], other[start:start + 512]
        for i in range(here.size):
            value = slope(there[i] - here[i], a, b, s) - top
            part += (growth(here[i]) + single(1)) * value + growth(there[i])
            there[i] = value
        total += part
    return total


@njit(**free)
def rows(mine, other, a, b, s, totals):
    for i in range(mine.shape[0]):
        totals[i] = row(mine[i], other[i], single(1.5), a, b, s)


mine = np.random.default_rng(0).standard_normal((8, 4099)).astype(single) * single(0.2)
other, totals = mine[::-1].copy(), np.zeros(8)
rows(mine, other, single(0), single(1), single(0.9), totals)
print(hashlib.sha256(other.tobytes()).hexdigest()[:8], "from disk" if rows.stats.cache_hits else "compiled")
PY
cd "$folder"
seen() {
    for process in 1 2 3; do
        NUMBA_CACHE_DIR="$folder/cache-$1" venv/bin/python rows.py "$1"
    done
}
seen called > called
seen inlined > inlined
echo "callee not inlined:"; cat called
echo "callee inlined:"; cat inlined
test "$(cut -d' ' -f2- called | uniq -c | awk '{print $1, $2}' | tr '\n' ';')" = "1 compiled;2 from;"
test "$(sed -n 1p called | cut -c1-8)" != "$(sed -n 2p called | cut -c1-8)"
test "$(sed -n 2p called | cut -c1-8)" = "$(sed -n 3p called | cut -c1-8)"
test "$(cut -c1-8 inlined | uniq | wc -l)" = 1

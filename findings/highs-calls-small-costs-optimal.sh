#!/usr/bin/env bash
# scipy 1.17.1 (HiGHS), milp: a program of eight yes-or-no variables whose costs are around 1e-7 is called "Optimal" at 1.8
# times the least cost, and `mip_dual_bound`, the proven lower bound, says the same: it lies 81% above a solution that
# exists. The gap of zero is shown as such. With all costs times 1e8 the answer is right. Its tolerances are absolute, 1e-6,
# and `mip_rel_gap=0` does not help: a bound is one only of costs that are large beside it.
# Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6
cat > "$folder/bound.py" <<'PY'
import itertools
import sys

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

draw = np.random.default_rng(29)
costs, weights = draw.integers(1, 100, 8), draw.integers(1, 20, 8)
needed = 0.6 * weights.sum()
least = min(int(np.dot(costs, one)) for one in itertools.product((0, 1), repeat=8) if np.dot(weights, one) >= needed)


def solved(scale):
    found = milp(costs * scale, integrality=np.ones(8), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0},
                 constraints=LinearConstraint(weights[None], needed, np.inf))
    print(f"costs times {scale:g}: status {found.status} ({found.message}), cost {found.fun / scale:.1f}, bound "
          f"{found.mip_dual_bound / scale:.1f}, gap {found.mip_gap:g}; the least cost of all 256 is {least}")
    return found.status, found.fun / scale, found.mip_dual_bound / scale


small, large = solved(1e-8), solved(1.0)
as_seen = small[0] == 0 and small[1] > 1.5 * least and small[2] > 1.5 * least and abs(large[1] - least) < 1e-6
print("as seen" if as_seen else "this has changed")
sys.exit(not as_seen)
PY
"$folder/venv/bin/python" "$folder/bound.py"

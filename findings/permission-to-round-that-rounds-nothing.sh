#!/usr/bin/env bash
# torch 2.13.0 on a CPU hands products of float32 tensors to MKL, and to oneDNN only with the permission to round their
# operands to bfloat16 (`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`). On processors with AVX-512 and without AMX,
# an AMD EPYC for one, oneDNN makes no use of it: the products are float32's to the last bit that a permutation can show.
# There the setting that names the lower precision changes the library and loses nothing; on AMD it was also twice as
# fast (2,048 x 896 x 4,864: 215 and 470 GFLOP/s on two cores). Where there is AMX, operands are rounded.
# Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/products.py" <<'PY'
import pathlib
import sys

import torch

given = 1 + torch.arange(256 * 256.0).view(256, 256) * 2.0**-23  # each needs all 24 bits
order = torch.arange(256).roll(1)
shuffle = torch.zeros(256, 256)
shuffle[order, torch.arange(256)] = 1
flags = pathlib.Path("/proc/cpuinfo").read_text()
amx, wide = "amx_bf16" in flags, "avx512f" in flags
print(f"found: AVX-512 {wide}, AMX {amx}", flush=True)
ok = True
for precision in ("none", "bf16"):
    torch.backends.mkldnn.matmul.fp32_precision = precision
    print(f"begin {precision}", flush=True)
    exact = torch.equal(given @ shuffle, given[:, order])
    print(f"found: {precision}: exact {exact}", flush=True)
    ok &= exact == (precision == "none" or not amx)
sys.exit(not (ok and wide))
PY
cd "$folder"
ONEDNN_VERBOSE=1 venv/bin/python products.py > log 2>&1 || { tail -5 log; exit 1; }
grep '^found' log
one=$(sed -n '/^begin none/,/^begin bf16/p' log | grep -c 'primitive,exec,cpu,matmul' || true)
other=$(sed -n '/^begin bf16/,$p' log | grep -c 'primitive,exec,cpu,matmul' || true)
echo "found: products by oneDNN: $one without the permission, $other with it"
test "$one" = 0 && test "$other" = 1

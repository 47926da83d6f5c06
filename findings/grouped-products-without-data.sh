#!/usr/bin/env bash
# torch 2.13.0: `torch.nn.functional.grouped_mm` on a CPU multiplies fp32, and its shape function refuses fp32: what runs
# with data cannot be traced, planned or exported without. So no mixture of experts of transformers 5.24.0 runs in fp32
# on the meta device or in FakeTensorMode as it comes. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/show.py" <<'PY'
import sys

import torch


def product(device):
    rows, experts = torch.ones(4, 8, device=device), torch.ones(2, 8, 16, device=device)
    return torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([2, 4], dtype=torch.int32, device=device))


real = product("cpu")
print("with data:   ", real.dtype, tuple(real.shape))
try:
    print("without data:", tuple(product("meta").shape))
    refused = False
except RuntimeError as error:
    print("without data:", str(error).splitlines()[0])
    refused = "BF16" in str(error)
sys.exit(not (real.dtype == torch.float32 and refused))
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null

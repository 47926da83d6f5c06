#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a mixture of experts whose `moe_intermediate_size` is 12 is built, saved, loaded
# and run in float32, and the same folder loaded in bfloat16 raises in its first forward pass, "strides should be multiple of 16
# bytes"; at 10 it does in float32, too. No configuration class says so. The experts' default implementation, grouped_mm,
# hands torch rows whose bytes have to be a multiple of 16: 4 channels in float32, 8 in half precision. With
# `experts_implementation="eager"` all of them run. Limbeck cuts channels of experts to multiples of 8, so that what it
# hands back runs in any dtype.
# Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/experts.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig


def runs(folder, dtype, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    try:
        with torch.no_grad():
            return "runs" if model(torch.arange(16)[None]).logits.isfinite().all() else "not finite"
    except RuntimeError as error:
        return str(error)


found = {}
for width in (8, 10, 12):
    config = Qwen3MoeConfig(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=width, head_dim=16,
                            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
                            num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(width))
    for dtype in (torch.float32, torch.bfloat16):
        found[width, dtype] = runs(str(width), dtype), runs(str(width), dtype, experts_implementation="eager")
        print(f"found: experts of {width} channels in {dtype}: {found[width, dtype][0]}; eager: {found[width, dtype][1]}",
              flush=True)
stride = "strides should be multiple of 16 bytes"
expected = {(width, dtype): "runs" if width % (16 // dtype.itemsize) == 0 else stride for width, dtype in found}
sys.exit(not all(found[key] == (expected[key], "runs") for key in found))
PY
cd "$folder"
venv/bin/python experts.py 2>log | grep '^found' || { tail -5 log; exit 1; }

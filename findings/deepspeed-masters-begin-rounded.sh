#!/usr/bin/env bash
# DeepSpeed 0.19.8 with bf16: the fp32 master weights are made from the bf16 copy of the model, not from the fp32 model
# that was handed over. A training that "keeps fp32 weights" begins up to half a unit of bf16's last place away from its
# file. Seen on the CPU backend with torch 2.13.0, ZeRO stages 1 and 2; Limbeck writes the true values into the masters.
# Needs a C++ compiler (DeepSpeed builds an operation on first use). Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 ninja==1.13.2 numpy
cat > "$folder/masters.py" <<'PY'
import sys

import deepspeed
import torch

deepspeed.init_distributed(dist_backend="gloo", verbose=False)
changed = False
for stage in (1, 2):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    given = model.weight.detach().clone().flatten()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config={
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False})
    masters = engine.optimizer.single_partition_of_fp32_groups[0].detach().flatten()[:given.numel()]
    rounded = torch.equal(masters, given.bfloat16().float())
    print(f"stage {stage}: masters are {masters.dtype}, at most {(masters - given).abs().max():.2e} from the weights "
          f"given; equal to their bf16 rounding: {rounded}")
    changed |= not rounded or torch.equal(masters, given)
sys.exit(changed)
PY
cd "$folder"
PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=29631 python masters.py 2>"$folder/log" | grep '^stage' || { tail -5 "$folder/log"; exit 1; }

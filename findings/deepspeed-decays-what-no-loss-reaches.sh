#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO stages 1 to 3, torch 2.13.0: a parameter that no loss depends on gets zeros for a gradient, so
# that AdamW's weight decay moves it, while the same optimizer without DeepSpeed leaves what has no gradient alone. Seen
# in decoders that are trained without their encoder (BART's cross-attention): they are not the same as after training
# on one process. Limbeck keeps such weights where they were.
# Needs a C++ compiler (DeepSpeed builds an operation on first use). Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 ninja==1.13.2 numpy
cat > "$folder/decays.py" <<'PY'
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        return self.used(hidden).square().mean()


def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)


def share(now, before):
    return float((now / before).mean())


deepspeed.init_distributed(dist_backend="gloo", verbose=False)
torch.manual_seed(0)
model = Model()
before, plain = model.unused.weight.detach().clone(), optimizer(model)
model(torch.randn(4, 16)).backward()
plain.step()
left = share(model.unused.weight.detach(), before)
print(f"found: torch alone: the unused weight is {left:.3f} of what it was", flush=True)
shares = []
for stage in (1, 2, 3):
    torch.manual_seed(0)
    model = Model()
    before = model.unused.weight.detach().clone()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config={
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}})
    engine.backward(engine(torch.randn(4, 16)))
    engine.step()
    shares.append(share(safe_get_full_fp32_param(model.unused.weight), before))
    print(f"found: stage {stage}: the unused weight is {shares[-1]:.3f} of what it was", flush=True)
sys.exit(not (left == 1 and all(abs(one - 0.95) < 1e-3 for one in shares)))
PY
cd "$folder"
PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=29633 python decays.py 2>"$folder/log" | grep '^found' || { tail -5 "$folder/log"; exit 1; }

#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO stage 3, torch 2.13.0: gradients of a "leaf module" (`set_z3_leaf_module`) whose forward returns
# a list never reach the optimizer. They are handed over by a full backward hook, and torch calls none where a module's
# output is neither a tensor nor a tuple. They stay on the parameters instead, where the step drops them before it
# updates; on the CPU backend it ends there, with an error about something else. The same module returning a tuple
# hands its gradients over. Blocks of transformers' OpenAI GPT return lists; Limbeck hands such outputs on as tuples.
# Needs a C++ compiler (DeepSpeed builds an operation on first use). Prints what was seen; exit code 1 if it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 ninja==1.13.2 numpy
cat > "$folder/leaves.py" <<'PY'
import sys

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module


class Block(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = torch.nn.Linear(16, 16), kind

    def forward(self, hidden):
        return self.kind([self.inner(hidden)])


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.block = torch.nn.Linear(16, 16), Block(kind)

    def forward(self, hidden):
        return self.block(self.first(hidden))[0].square().mean()


deepspeed.init_distributed(dist_backend="gloo", verbose=False)
reached = {}
for kind in (list, tuple):
    torch.manual_seed(0)
    model = Model(kind)
    set_z3_leaf_module(model.block, True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config={
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    engine.backward(engine(torch.randn(4, 16)))
    reached[kind] = int(engine.optimizer.grad_partitions_flat_buffer.count_nonzero())
    error = None
    try:
        engine.step()
    except RuntimeError as raised:
        error = str(raised).partition("\n")[0]
    print(f"found: block returns a {kind.__name__}: {reached[kind]} of 544 gradients are in the optimizer's hands, the "
          f"step's error: {error}", flush=True)
sys.exit(reached != {list: 272, tuple: 544})
PY
cd "$folder"
PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=29632 python leaves.py 2>"$folder/log" | grep '^found' || { tail -5 "$folder/log"; exit 1; }

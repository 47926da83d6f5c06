#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO stage 3, torch 2.13.0: in a "leaf module" (`set_z3_leaf_module`) whose input needs no gradient,
# as the first block above frozen embeddings is when adapters are trained, weights are emptied before their backward,
# which ends with a size that does not match. The gradient of the module's input is taken for the end of its backward,
# and without one the end is taken to be there at once. Without `set_z3_leaf_module`, or once the input asks for a
# gradient, all gradients arrive. Limbeck has frozen embeddings ask for one, and counts its bytes.
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
    def __init__(self):
        super().__init__()
        self.down, self.up = torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(4, 16, bias=False)

    def forward(self, hidden):
        return hidden + self.up(self.down(hidden))


class Model(torch.nn.Module):
    def __init__(self, asks):
        super().__init__()
        self.first, self.block, self.asks = torch.nn.Embedding(8, 16), Block(), asks
        self.first.requires_grad_(False)

    def forward(self, ids):
        hidden = self.first(ids)
        return self.block(hidden.requires_grad_() if self.asks else hidden).square().mean()


deepspeed.init_distributed(dist_backend="gloo", verbose=False)
said = {}
for leaf, asks in ((True, False), (False, False), (True, True)):
    torch.manual_seed(0)
    model = Model(asks)
    set_z3_leaf_module(model.block, leaf)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(
        [one for one in model.parameters() if one.requires_grad], lr=1.0), config={
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    try:
        engine.backward(engine(torch.arange(8)))
        said[leaf, asks] = f"{int(engine.optimizer.grad_partitions_flat_buffer.count_nonzero())} of 128 gradients"
    except RuntimeError as raised:
        said[leaf, asks] = str(raised).partition("\n")[0]
    print(f"found: leaf {leaf}, a gradient of its input asked for {asks}: {said[leaf, asks]}", flush=True)
sys.exit(said != {(True, False): "The size of tensor a (0) must match the size of tensor b (4) at non-singleton dimension 1",
                  (False, False): "128 of 128 gradients", (True, True): "128 of 128 gradients"})
PY
cd "$folder"
PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=29633 python leaves.py 2>"$folder/log" | grep '^found' || { tail -5 "$folder/log"; exit 1; }

#!/usr/bin/env bash
# torch 2.13.0: where a tensor is used twice, autograd adds its two gradients in place (aten::add_) in an ordinary
# backward, and out of place (aten.add) while any TorchDispatchMode is on, even one that only looks. Whoever counts
# memory by such a mode sees one more copy of that gradient than training has; with a head tied to embeddings that is
# the largest tensor of a step. Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/sums.py" <<'PY'
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class HandsOver(torch.autograd.Function):
    """Its backward gives away a gradient that nothing else holds."""

    @staticmethod
    def forward(ctx, weight):
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(ctx.shape)


class Looks(TorchDispatchMode):
    """Changes nothing; remembers additions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def used_twice():
    weight = torch.zeros(1000, 100, requires_grad=True).view(1000, 100)
    return HandsOver.apply(weight) + HandsOver.apply(weight)


plain, looked_at, mode = used_twice(), used_twice(), Looks()
with profile(activities=[ProfilerActivity.CPU]) as profiled:
    plain.backward()
with mode:
    looked_at.backward()
ordinary = [event.key for event in profiled.key_averages() if event.key in ("aten::add", "aten::add_")]
print("ordinary backward:", *ordinary)
print("under a mode:     ", *mode.seen)
sys.exit(not (ordinary == ["aten::add_"] and mode.seen == ["aten.add.Tensor"]))
PY
"$folder/venv/bin/python" "$folder/sums.py" 2>/dev/null

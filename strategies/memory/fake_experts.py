"""Importing this module lets mixtures of experts run on fake tensors.

transformers computes experts with torch's grouped matrix product. Its shape function (torch 2.13) rejects fp32, which
the kernel itself supports. On fake tensors, transformers' own operator for the same product is used instead, which
saves and returns the same tensors.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations import moe

_own = moe._can_use_grouped_mm


def _can_use_grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
    return not isinstance(weight, FakeTensor) and _own(input, weight, offs)


moe._can_use_grouped_mm = _can_use_grouped_mm

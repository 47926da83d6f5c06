"""Mixtures of experts on tensors without data: importing this makes their products have shapes there.

transformers multiplies experts by torch's grouped product, whose shape function (torch 2.13) refuses fp32, which the
kernel itself multiplies. On tensors without data its own operator for the same product is taken instead, which keeps
and gives the same tensors.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations import moe

_own = moe._can_use_grouped_mm


def _can_use_grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
    return not isinstance(weight, FakeTensor) and _own(input, weight, offs)


moe._can_use_grouped_mm = _can_use_grouped_mm

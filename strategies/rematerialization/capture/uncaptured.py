"""Regions that cannot be captured as one graph: measure what one forward and backward of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from strategies.memory.meter import resident_tensors
from strategies.memory.tracker import LiveBytes
from strategies.rematerialization.capture.compile_region import own_forward

HALF = (torch.float16, torch.bfloat16)

Workspace = Callable[[Any, tuple, dict], int | None]


@dataclass(frozen=True)
class MeasuredCall:
    """What one forward and backward of an uncaptured region needed.

    Attributes:
        kept: bytes that autograd saved for the backward, excluding parameters, arguments and outputs.
        forward: peak bytes of the forward, excluding its arguments.
        backward: peak bytes of the backward, including what was saved and the incoming gradients.
        handed: bytes of the outputs.
        operations: floating-point operations of the forward's matrix products.
        half: whether outputs have 16 bits.
    """

    kept: int
    forward: int
    backward: int
    handed: int
    operations: int
    half: bool


def measured_call(module: nn.Module, args: tuple, kwargs: dict, workspace: Workspace | None = None
                  ) -> tuple[object, MeasuredCall]:
    """Call a module's own forward, run its backward once with zero gradients; return the output and measurements.

    Args:
        workspace: counts what kernels take beside their outputs, as in `LiveBytes`; None if somebody else does.
    """
    given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    with LiveBytes(workspace=workspace) as tracker:
        with FlopCounterMode(display=False) as flops:
            out = own_forward(module, *args, **kwargs)
        handed_out = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        handed = resident_tensors(handed_out)
        forward, kept = tracker.peak, max(0, tracker.current - handed)
        tracker.peak = tracker.current
        turned = [leaf for leaf in handed_out if leaf.requires_grad]
        wanted = [leaf for leaf in [*given, *module.parameters()] if leaf.requires_grad]
        if turned and wanted:
            torch.autograd.grad(turned, wanted, [torch.zeros_like(leaf) for leaf in turned], allow_unused=True)
        backward = max(kept, tracker.peak - handed)
    half = bool({leaf.dtype for leaf in handed_out} & set(HALF))
    return out, MeasuredCall(kept, forward, backward, handed, flops.get_total_flops(), half)

"""Regions that cannot be captured whole: they keep what autograd keeps, or only their input."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from strategies.memory.tracker import LiveBytes
from strategies.rematerialization.chain import Option
from strategies.rematerialization.execute import own_forward
from strategies.rematerialization.price import HALF, Device
from strategies.rematerialization.regions import Call, Meta

KEEP, CHECKPOINT = "keep", "checkpoint"
STATE = 16_384  # bytes of generator states and arguments that a checkpoint keeps


def fallback_options(call: Call, device: Device, where: AbstractContextManager | None = None) -> tuple[
        tuple[Option, ...], float]:
    """Both ways to run a region as it is, and the seconds of its forward, by running it once on blank tensors.

    Args:
        call: the region and what it was given.
        device: for the time, which is that of its matrix products.
        where: FakeTensorMode, if it is to run on tensors without data.
    """
    with where or nullcontext(), LiveBytes() as tracker, FlopCounterMode(display=False) as flops:
        leaves, spec = call.arguments
        given = [leaf.empty().zero_().requires_grad_(leaf.requires_grad) if isinstance(leaf, Meta) else leaf
                 for leaf in leaves]
        args, kwargs = tree_unflatten(given, spec)
        before = tracker.current
        tracker.peak = before
        out = [leaf for leaf in tree_flatten(own_forward(call.module, *args, **kwargs))[0]
               if isinstance(leaf, torch.Tensor)]
        handed = sum({leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in out}.values())
        forward, kept = tracker.peak - before, tracker.current - before - handed
        operations = flops.get_total_flops()
        turned = [leaf for leaf in out if leaf.requires_grad]
        parameters = [parameter for parameter in call.module.parameters() if parameter.requires_grad]
        wanted = [leaf for leaf in [*given, *parameters] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        tracker.peak = tracker.current
        gradients = torch.autograd.grad(turned, wanted, [torch.empty_like(leaf) for leaf in turned], allow_unused=True)
        backward = tracker.peak - before - handed
        del gradients
    seconds = operations / (device.half if {leaf.dtype for leaf in out} & set(HALF) else device.single)
    return (Option(kept, forward, backward, 0.0, mode=KEEP),
            Option(STATE, forward, backward + handed, seconds, mode=CHECKPOINT)), seconds

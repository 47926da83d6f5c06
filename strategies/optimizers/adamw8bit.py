"""AdamW with bitsandbytes' 8-bit moments, on whole or sharded parameters.

What bitsandbytes 0.50 does, on CPU as on CUDA: both moments are stored as one byte per element, quantized in blocks of
256 consecutive elements with one fp32 maximum each (1/64 byte per element and moment). A tensor with fewer than 4096
elements (`min_8bit_size`) keeps both moments in 32 bits: norms and biases and, under FSDP2, any parameter of which a
rank holds fewer than 4096 elements. A rank's flat part in ZeRO is one tensor, so all of it is in 8 bits, norms and
biases too. Moments are rounded anew at each step. Blocks begin where a rank's part does, so sharded and whole training
differ by that rounding unless parts begin at multiples of 256. Each code map (256 fp32 numbers) is shared by all
tensors.

On CPU its quantizer looks codes up in a coarse table, in which 0 gets the code of 2e-5 times the block's maximum. So
elements that never had a gradient (padding, unseen tokens), in a block with others that had one, drift by a few
thousandths of the learning rate at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from strategies.common.shards import local
from strategies.optimizers.norms import check, evaluated, flat_gradient, with_gradient
from strategies.optimizers.transient import Sharing, traced

BLOCK = 256
BYTES_ON_CPU = 20  # temporary bytes per element of a tensor in bitsandbytes 0.50's CPU step


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with block-wise quantized moments (Dettmers et al. 2022, arXiv 2110.02861).

    For each step, `bitsandbytes.optim.AdamW8bit` is lent the rank's own part of each tensor and its state.

    State per tensor: `step` (an int), `state1` and `state2` (the moments, shaped as the rank's part, uint8 or fp32),
    and with uint8 `absmax1`, `absmax2` (fp32, one per block) and the shared code maps `qmap1`, `qmap2`.

    Args:
        groups: each with its "weight_decay".
        min_8bit_size: number of elements from which a tensor's moments are kept in 8 bits.

    Raises:
        ValueError: bitsandbytes is not installed, or a setting is out of range.
    """

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0, min_8bit_size: int = 4096) -> None:
        check(lr, weight_decay, betas)
        try:
            from bitsandbytes.optim import AdamW8bit as Theirs
        except ImportError as error:
            raise ValueError("8-bit AdamW is that of bitsandbytes: pip install bitsandbytes") from error
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._smallest = min_8bit_size
        with unset_fake_temporarily():  # its tables need data, even when planning on fake tensors
            self._theirs = Theirs([nn.Parameter(torch.zeros(1, device="cpu"))], lr=lr, betas=betas, eps=eps,
                                  min_8bit_size=min_8bit_size)

    gathers_updates = False

    def transient_bytes(self, sharing: Sharing) -> int:
        """On CPU, those of the largest part, as bitsandbytes computes its step with torch operations; else traced."""
        parts = [part for group in self.param_groups for part in group["params"]]
        return BYTES_ON_CPU * max(part.numel() for part in parts) if sharing.on_cpu else traced(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = evaluated(closure)
        theirs = self._theirs
        for tensor, group in with_gradient(self.param_groups):
            own = local(tensor)
            if not own.numel():
                continue
            if isinstance(own, FakeTensor):  # in planning, only the state matters
                self.state[tensor] = self.state[tensor] or self._without_data(own)
                continue
            lent = nn.Parameter(own)
            lent.grad = flat_gradient(tensor).view_as(own)
            theirs.param_groups, theirs.state = [{**group, "params": [lent]}], {lent: self.state[tensor]}
            theirs.step()
            if lent.data_ptr() != own.data_ptr():  # it made a contiguous copy of the weight
                own.copy_(lent)
        theirs.param_groups, theirs.state = [], {}
        return loss

    def fresh_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor before its first step; empty if the rank has no elements of it."""
        own = nn.Parameter(local(tensor))
        if not own.numel():
            return {}
        theirs, state = self._theirs, {}
        theirs.param_groups, theirs.state = [{**self.defaults, "params": [own]}], {own: state}
        theirs.init_state(theirs.param_groups[0], own, 0, 0)
        theirs.param_groups, theirs.state = [], {}
        return state

    def _without_data(self, own: torch.Tensor) -> dict[str, Any]:
        """State of a fake tensor, of the same size as a real one's; the shared code maps are not included."""
        if own.numel() < self._smallest:
            return {name: torch.zeros_like(own, dtype=torch.float32) for name in ("state1", "state2")}
        state = {name: torch.zeros_like(own, dtype=torch.uint8) for name in ("state1", "state2")}
        blocks = -(-own.numel() // BLOCK)
        return state | {name: torch.zeros(blocks, device=own.device) for name in ("absmax1", "absmax2")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that uint8 state stays uint8: torch would cast all state to the weight's dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(numbers, tensors, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[tensor][name] = value.to(tensor.device, copy=True)


def adamw8bit(groups: Any, *, lr: float, betas: tuple[float, float], eps: float) -> AdamW8bit:
    """`AdamW8bit` of groups from `parameter_groups`."""
    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)


def moment(state: dict[str, Any], number: int) -> torch.Tensor:
    """The first or second moment, a new flat fp32 tensor, computed as in the optimizer's step: code times maximum."""
    kept = state[f"state{number}"].view(-1)
    if kept.dtype != torch.uint8:
        return kept.float().clone()
    values = _values(_blocks(kept).long(), state[f"qmap{number}"], state[f"absmax{number}"])
    return values.view(-1)[:kept.numel()].clone()


def set_moment(state: dict[str, Any], number: int, values: torch.Tensor) -> None:
    """Write a moment, flat fp32, in place; values read by `moment` are restored exactly.

    A block's maximum cannot be read off its values: the most negative code is -0.993, and a block whose largest element
    is negative has no code 1. So each block gets the maximum that reproduces its values or, if there is none (a block
    merged from several layouts' blocks), its largest absolute value.
    """
    kept = state[f"state{number}"].view(-1)
    if kept.dtype != torch.uint8:
        kept.copy_(values)
        return
    codes, values = state[f"qmap{number}"], _blocks(values.float())
    largest = values.abs().amax(1)
    best, chosen = largest.clone(), _nearest(values, largest, codes)
    open_ = (_values(chosen, codes, best) != values).any(1)
    for candidate in _candidates(largest, codes):
        if not bool(open_.any()):
            break
        rows = open_.nonzero().view(-1)
        tried = _nearest(values[rows], candidate[rows], codes)
        right = (_values(tried, codes, candidate[rows]) == values[rows]).all(1)
        best[rows[right]], chosen[rows[right]] = candidate[rows[right]], tried[right]
        open_[rows[right]] = False
    kept.copy_(chosen.view(-1)[:kept.numel()])
    state[f"absmax{number}"].copy_(best)


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """[blocks, 256], padded with zeros."""
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _values(chosen: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return codes[chosen] * largest.unsqueeze(1)


def _nearest(values: torch.Tensor, largest: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 256]: indices of the (sorted) codes nearest to the values divided by their block's maximum."""
    scaled = values / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    return torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)


def _candidates(largest: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """Possible maxima of blocks whose largest element has the most negative code, neighbors included for rounding."""
    found = [largest / -codes[0]]
    for direction in (math.inf, 0.0):
        near = found[0]
        for _ in range(2):
            near = torch.nextafter(near, torch.full_like(near, direction))
            found.append(near)
    return found

"""AdamW with 8-bit moments from bitsandbytes, whole or sharded.

What bitsandbytes 0.50 does, the same on CPU as on CUDA: both moments are kept as one byte per element, quantized
in blocks of 256 consecutive elements, each with an fp32 maximum (1/64 byte per element and moment). A tensor with fewer
than 4096 elements (`min_8bit_size`) keeps both moments in 32 bits: norms and biases, and, under FSDP2, any parameter of
which a rank holds fewer than 4096 elements. A rank's flat part in ZeRO is one tensor, so all of it is in 8 bits, norms
and biases too. Moments are rounded anew at each step; blocks begin where a rank's part does, so that sharded and
whole training differ by that rounding unless parts begin at multiples of 256. Each code map (256 fp32 numbers) is
shared by all tensors.

On CPU its quantizer looks codes up in a coarse table, in which 0 has the code of 2e-5 times the block's maximum:
elements that never had a gradient (padding, tokens not seen), beside others that had one, creep by some thousandths of
the learning rate at each step.
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
BYTES_ON_CPU = 20  # that bitsandbytes 0.50 takes for each element of a tensor in its step there, for a moment


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with block-wise quantized moments (Dettmers et al. 2022, arXiv 2110.02861).

    `bitsandbytes.optim.AdamW8bit` is lent the rank's own part of each tensor and its state for each step.

    State per tensor: `step` (an int), `state1` and `state2` (the moments, shaped as the rank's part, uint8 or fp32),
    and with uint8 `absmax1`, `absmax2` (fp32, one per block) and the shared code maps `qmap1`, `qmap2`.

    Args:
        groups: each with its "weight_decay".
        min_8bit_size: elements of the smallest tensor that is kept in 8 bits.

    Raises:
        ValueError: bitsandbytes is not installed, or a setting is out of its range.
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
        with unset_fake_temporarily():  # its tables hold numbers, also where a plan makes the rest without
            self._theirs = Theirs([nn.Parameter(torch.zeros(1, device="cpu"))], lr=lr, betas=betas, eps=eps,
                                  min_8bit_size=min_8bit_size)

    gathers_updates = False

    def transient_bytes(self, sharing: Sharing) -> int:
        """On CPU, where bitsandbytes computes a tensor's step out of torch's operations, of the largest part."""
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
            if isinstance(own, FakeTensor):  # a step that is only planned: of it the state remains
                self.state[tensor] = self.state[tensor] or self._without_data(own)
                continue
            lent = nn.Parameter(own)
            lent.grad = flat_gradient(tensor).view_as(own)
            theirs.param_groups, theirs.state = [{**group, "params": [lent]}], {lent: self.state[tensor]}
            theirs.step()
            if lent.data_ptr() != own.data_ptr():  # it makes a weight contiguous elsewhere
                own.copy_(lent)
        theirs.param_groups, theirs.state = [], {}
        return loss

    def fresh_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor before its first step; of one that has no elements here: none."""
        own = nn.Parameter(local(tensor))
        if not own.numel():
            return {}
        theirs, state = self._theirs, {}
        theirs.param_groups, theirs.state = [{**self.defaults, "params": [own]}], {own: state}
        theirs.init_state(theirs.param_groups[0], own, 0, 0)
        theirs.param_groups, theirs.state = [], {}
        return state

    def _without_data(self, own: torch.Tensor) -> dict[str, Any]:
        """State of a tensor without data, as large as the real one's; the code maps are shared, and not in it."""
        if own.numel() < self._smallest:
            return {name: torch.zeros_like(own, dtype=torch.float32) for name in ("state1", "state2")}
        state = {name: torch.zeros_like(own, dtype=torch.uint8) for name in ("state1", "state2")}
        blocks = -(-own.numel() // BLOCK)
        return state | {name: torch.zeros(blocks, device=own.device) for name in ("absmax1", "absmax2")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that bytes stay bytes: torch would cast all state to the weight's type."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(numbers, tensors, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[tensor][name] = value.to(tensor.device, copy=True)


def adamw8bit(groups: Any, *, lr: float, betas: tuple[float, float], eps: float) -> AdamW8bit:
    """`AdamW8bit` of groups as `parameter_groups` makes them."""
    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)


def moment(state: dict[str, Any], number: int) -> torch.Tensor:
    """The first or second moment, flat fp32, new, computed as the optimizer's own step does: code times maximum."""
    kept = state[f"state{number}"].view(-1)
    if kept.dtype != torch.uint8:
        return kept.float().clone()
    values = _values(_blocks(kept).long(), state[f"qmap{number}"], state[f"absmax{number}"])
    return values.view(-1)[:kept.numel()].clone()


def set_moment(state: dict[str, Any], number: int, values: torch.Tensor) -> None:
    """Write a moment, flat fp32, in place; values that `moment` gave are written back as exactly those values.

    A block's maximum cannot be read off its values: the largest code below zero is -0.993, and a block whose largest
    element is negative has no code 1. So each block gets the maximum with which its values survive; where
    there is none (a block made of several layouts' blocks), its largest absolute value.
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
    """[blocks, 256], filled up with zeros."""
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _values(chosen: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return codes[chosen] * largest.unsqueeze(1)


def _nearest(values: torch.Tensor, largest: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 256]: numbers of the codes (sorted) that are nearest to values over their block's maximum."""
    scaled = values / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    return torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)


def _candidates(largest: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """Maxima of blocks whose largest element has the most negative code; rounding hides last bits: some beside."""
    found = [largest / -codes[0]]
    for direction in (math.inf, 0.0):
        near = found[0]
        for _ in range(2):
            near = torch.nextafter(near, torch.full_like(near, direction))
            found.append(near)
    return found

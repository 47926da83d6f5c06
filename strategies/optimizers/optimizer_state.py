"""Optimizer state by parameter, so that a checkpoint of one engine and number of ranks can be loaded by another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from strategies.common.shards import Layout, Piece, layout_of, local, total_numel
from strategies.optimizers import adafactor
from strategies.optimizers.adafactor import Adafactor
from strategies.optimizers.adamw8bit import AdamW8bit, moment, set_moment

_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""bitsandbytes' number of each moment."""


@dataclass(frozen=True)
class PieceState:
    """The optimizer state of a rank's piece of a parameter; both dicts are empty before its first step.

    Attributes:
        elementwise: flat fp32 tensors with one number per element of the piece (`exp_avg`, `exp_avg_sq`,
            `momentum_buffer`, `variance`); 8-bit moments are dequantized.
        whole: state that is the same on all ranks: `step`, a scalar, and Adafactor's `row_var` [.., R, 1] and `col_var`
            [.., 1, C].
    """

    elementwise: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def read_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> list[PieceState]:
    """Copies of the state of every piece of `layout_of(tensor)`, on the tensor's device.

    Raises:
        ValueError: an entry has neither one element nor as many as the rank's part of the tensor.
    """
    layout, state = layout_of(tensor), optimizer.state.get(tensor) or {}
    if not state:
        return [PieceState() for _ in layout.pieces]
    step = {"step": _scalar(state["step"], tensor)} if "step" in state else {}
    if isinstance(optimizer, Adafactor):
        return [_read_adafactor(own, step) for own in adafactor.views(state, layout)]
    flat = _flat_entries(optimizer, tensor, state)
    return [PieceState({name: piece.of(values).clone() for name, values in flat.items()},
                       {name: value.clone() for name, value in step.items()}) for piece in layout.pieces]


def write_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, states: Sequence[PieceState]) -> None:
    """Replace a tensor's state by what was read from its pieces; weights are not touched.

    Written back to the layout it was read from, it makes the next step bitwise the same. Where blocks of 256 begin
    elsewhere, 8-bit moments are rounded once more. A piece without state beside others that have some gets zeros.

    Raises:
        ValueError: the states do not fit the tensor's pieces, or pieces of one tensor have taken different numbers of
            steps.
    """
    layout = layout_of(tensor)
    _check(layout.pieces, states)
    if not any(state.whole or state.elementwise for state in states):
        optimizer.state.pop(tensor, None)
        return
    names = dict.fromkeys(name for state in states for name in state.elementwise)
    fresh = _fresh(optimizer, tensor, names)
    _write_step(optimizer, fresh, layout.pieces, states, tensor)
    optimizer.state[tensor] = fresh
    if isinstance(optimizer, Adafactor):
        for views, state in zip(adafactor.views(fresh, layout), states, strict=True):
            for name, value in ({**state.whole, **state.elementwise}).items():
                if name != "step":
                    views[name].copy_(value.view(views[name].shape))
        return
    for name in names if fresh else ():
        _write_flat(optimizer, tensor, fresh, name, _assembled(tensor, layout, states, name))


# ---- reading

def _read_adafactor(own: dict[str, torch.Tensor], step: dict[str, torch.Tensor]) -> PieceState:
    elementwise = {name: value.float().clone() for name, value in own.items() if name == "variance"}
    whole = {name: value.clone() for name, value in (own | step).items() if name != "variance"}
    return PieceState(elementwise, whole)


def _flat_entries(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, state: dict[str, Any]
                  ) -> dict[str, torch.Tensor]:
    if isinstance(optimizer, AdamW8bit):
        return {name: moment(state, number) for name, number in _MOMENTS.items()}
    size, found = local(tensor).numel(), {}
    for name, value in state.items():
        if name == "step":
            continue
        if not isinstance(value, torch.Tensor) or local(value).numel() != size:
            raise ValueError(f"{type(optimizer).__name__} keeps {name!r} in a form that checkpoints do not know")
        found[name] = local(value).reshape(-1).float()
    return found


def _scalar(step: Any, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(step, dtype=torch.float32).detach().to(tensor.device, copy=True)


# ---- writing

def _check(pieces: Sequence[Piece], states: Sequence[PieceState]) -> None:
    if len(pieces) != len(states):
        raise ValueError(f"{len(states)} states for {len(pieces)} pieces")
    for piece, state in zip(pieces, states, strict=True):
        for name, value in state.elementwise.items():
            if value.numel() != piece.numel:
                raise ValueError(f"{name!r} of {piece.name!r} has {value.numel()} elements, its piece {piece.numel}")


def _fresh(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Initial state as the optimizer itself creates it; torch's own optimizers have entries like the tensor."""
    if hasattr(optimizer, "fresh_state"):
        return optimizer.fresh_state(tensor)
    state = {"step": torch.zeros((), device=tensor.device)}
    return state | {name: torch.zeros_like(tensor.detach()) for name in names}


def _write_step(optimizer: torch.optim.Optimizer, fresh: dict[str, Any], pieces: Sequence[Piece],
                states: Sequence[PieceState], tensor: torch.Tensor) -> None:
    steps = {piece.name: float(state.whole["step"]) for piece, state in zip(pieces, states, strict=True)
             if "step" in state.whole}
    if len(set(steps.values())) > 1:
        raise ValueError(f"parameters that one tensor holds have taken different numbers of steps: {steps}")
    if not steps or not fresh:
        fresh.pop("step", None)
    elif isinstance(optimizer, AdamW8bit):
        fresh["step"] = int(next(iter(steps.values())))
    else:
        fresh["step"] = torch.full_like(fresh["step"], next(iter(steps.values())))


def _assembled(tensor: torch.Tensor, layout: Layout, states: Sequence[PieceState], name: str) -> torch.Tensor:
    """[elements of the rank's part]: the pieces in their places, with zero padding."""
    flat = torch.zeros(local(tensor).numel(), device=tensor.device)
    for piece, state in zip(layout.pieces, states, strict=True):
        if name in state.elementwise:
            piece.of(flat).copy_(state.elementwise[name])
    assert total_numel(layout.pieces) <= flat.numel()
    return flat


def _write_flat(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, fresh: dict[str, Any], name: str,
                flat: torch.Tensor) -> None:
    if isinstance(optimizer, AdamW8bit):
        set_moment(fresh, _MOMENTS[name], flat)
    else:
        own = local(fresh[name])
        own.copy_(flat.view(own.shape))

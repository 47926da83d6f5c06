"""Scales and zero points of groups of weights: those that cover the range, and those of the least squared error."""

from __future__ import annotations

from typing import Protocol

import torch

RATIOS = 64  # number of fractions of the covering range tried in the search for the least error
SMALLEST, LARGEST = 0.2, 1.06  # of these: 4,096 normal weights in 2 bits are best at 0.4, and few weights above 1


class Range(Protocol):
    """What these functions need of a quantizer."""

    @property
    def kind(self) -> str: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def lowest(self) -> int: ...

    @property
    def highest(self) -> int: ...

    @property
    def positive(self) -> bool: ...


Found = tuple[torch.Tensor, torch.Tensor | None]


def ranges(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and most weight (outputs, groups), fp32, of (outputs, groups, weights of a group)."""
    least, most = torch.aminmax(groups, dim=-1)
    return least.float(), most.float()


def covering(least: torch.Tensor, most: torch.Tensor, of: Range) -> Found:
    """Scale and zero point (outputs, groups), fp32, of the range that covers all weights of a group.

    Args:
        least, most: (outputs, groups) the range, fp32.
        of: the quantizer's number range.
    """
    if of.kind == "fp8":
        return torch.maximum(most, -least) / of.highest, None
    if of.symmetric and of.positive:
        return torch.maximum(most / of.highest, least / of.lowest), None
    if of.symmetric:
        return torch.where(most > -least, most, least) / of.lowest, None
    least, most = least.clamp(max=0), most.clamp(min=0)
    scale = (most - least) / (of.highest - of.lowest)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (of.lowest - least / safe).round().clamp(of.lowest, of.highest)


def best(groups: torch.Tensor, of: Range) -> Found:
    """Scale and zero point of the least squared error, among ranges that are fractions of the covering one.

    On a symmetric integer grid both signs of the scale are tried, because one side has one number more.
    """
    least, most = ranges(groups)
    groups = groups.float()
    signs = (1, -1) if of.symmetric and of.kind == "int" and not of.positive else (1,)
    chosen, lowest = covering(least, most, of), torch.full_like(least, torch.inf)
    for ratio in torch.linspace(LARGEST, SMALLEST, RATIOS).tolist():
        for sign in signs:
            scale, zero_point = covering(ratio * least, ratio * most, of)
            scale = sign * torch.where(scale == 0, torch.ones_like(scale), scale)
            error = _error(groups, scale, zero_point, of)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            chosen = (torch.where(better, scale, chosen[0]),
                      None if zero_point is None else torch.where(better, zero_point, chosen[1]))
    return chosen


def _error(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, of: Range) -> torch.Tensor:
    scale = scale.unsqueeze(-1)
    if of.kind == "fp8":
        found = (groups / scale).clamp_(of.lowest, of.highest).to(torch.float8_e4m3fn).float()
    elif zero_point is None:
        found = (groups / scale).round_().clamp_(of.lowest, of.highest)
    else:
        zero_point = zero_point.unsqueeze(-1)
        found = ((groups / scale).round_() + zero_point).clamp_(of.lowest, of.highest) - zero_point
    return (found * scale - groups).square_().sum(-1)


def best_ternary(groups: torch.Tensor) -> torch.Tensor:
    """The scale (outputs, groups) for which scale * {-1, 0, 1} has the least squared error, exactly.

    For the k largest magnitudes the best scale is their mean m_k, which lowers the squared error by k m_k^2 (Li et al.
    2016, eq. 4-5); the best k is found by trying all. Rounding to nearest then keeps those above m_k / 2.
    """
    sizes = groups.float().abs().sort(-1, descending=True).values
    sums = sizes.cumsum(-1)
    count = torch.arange(1, sizes.shape[-1] + 1, device=sizes.device)
    best_count = (sums.square() / count).argmax(-1, keepdim=True)
    return (sums.gather(-1, best_count) / (best_count + 1)).squeeze(-1)

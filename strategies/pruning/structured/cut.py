"""What a structured cut keeps: a fraction or a number of each kind of unit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

ORDER = ("layers", "experts", "heads", "mlp", "width", "channels")  # each is scored after those before it are cut
UNITS = ("heads", "kv_heads", "mlp", "width", "layers", "experts", "channels")


@dataclass(frozen=True)
class Cut:
    """How many units of each kind remain: a fraction 0 < f < 1 of them, a count, or None for all.

    Attributes:
        heads: query heads; within grouped-query attention the same number in every group.
        kv_heads: key-value heads, each with the query heads that share it.
        mlp: channels between the up and down projections of every feed-forward part, and of every expert.
        width: channels of the residual stream, `hidden_size`.
        width_by: `selection` keeps the channels with the highest scores; `rotation` turns the residual stream to its
            principal components first and keeps the first of them.
        layers: blocks.
        experts: of each mixture of experts.
        channels: of every convolution, as a fraction.
        multiple_of: counts of `mlp`, `width` and `channels` are rounded down to a multiple of it.

    Raises:
        ValueError: nothing is cut, or a number is out of its range.
    """

    heads: float | int | None = None
    kv_heads: float | int | None = None
    mlp: float | int | None = None
    width: float | int | None = None
    width_by: Literal["selection", "rotation"] = "selection"
    layers: float | int | None = None
    experts: float | int | None = None
    channels: float | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        asked = {one.name: getattr(self, one.name) for one in fields(self) if one.name in UNITS}
        if all(value is None for value in asked.values()):
            raise ValueError(f"nothing is cut: give at least one of {', '.join(UNITS)}")
        for name, value in asked.items():
            if value is not None and not _in_range(value):
                raise ValueError(f"{name}: {value} is neither a fraction between 0 and 1 nor a count"
                                 + "; 1.0 keeps all of them, so that nothing is cut" * (value == 1.0))
        if self.channels is not None and self.channels >= 1:
            raise ValueError(f"channels: {self.channels} is no fraction between 0 and 1: layers differ in how many "
                             "channels they have, so that one count cannot serve all")
        if self.width_by == "rotation" and self.width is None:
            raise ValueError("width_by: rotation needs a `width` to cut to")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of: {self.multiple_of} is not a positive number")


def _in_range(value: float | int) -> bool:
    return 0 < value < 1 or isinstance(value, int) and value >= 1


def kept_of(name: str, asked: float | int, count: int, multiple_of: int = 1) -> int:
    """How many of `count` units remain.

    Args:
        name: of the kind of unit, for errors.
        asked: a fraction, which is rounded to the nearest count, or a count.
        multiple_of: the count is rounded down to a multiple of this.

    Raises:
        ValueError: none, all, or more than there are would remain; it names the nearest choice.
    """
    wanted = asked if isinstance(asked, int) else int(asked * count + 0.5)
    kept = wanted // multiple_of * multiple_of
    if kept < 1:
        least = min(multiple_of, count)
        raise ValueError(f"{name}: {asked} of {count} leaves none"
                         + f" as a multiple of {multiple_of}" * (multiple_of > 1) + f"; the least is {least}")
    if kept > count:
        raise ValueError(f"{name}: {asked} cannot remain, there are {count}; use fewer than {count}")
    if kept == count:
        below = (count - 1) // multiple_of * multiple_of
        raise ValueError(f"{name}: {asked} of {count} keeps all of them, so that nothing is cut"
                         + (f"; use at most {below}" if below else "; there is nothing to cut"))
    return kept

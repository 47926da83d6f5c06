"""Which weights of a matrix may be zero: any share of them, or all but N of every M in a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pattern:
    """How many weights of a layer are zero, and where they may be.

    Attributes:
        sparsity: share of the weights that are zero, between 0 and 1.
        kept: weights that stay of every `of` consecutive ones in a row (N of M, as in 2:4); None without such a rule.
        of: how many these are.
    """

    sparsity: float
    kept: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, sparsity: float | None = None, pattern: str | None = None) -> Pattern:
        """The pattern of a share of zeros, or of a name such as "2:4", which keeps 2 weights of every 4.

        Raises:
            ValueError: both are given or neither, or one is out of its range.
        """
        if (sparsity is None) == (pattern is None):
            raise ValueError("give either a sparsity, such as 0.5, or a pattern, such as 2:4")
        if sparsity is not None:
            if not 0 < sparsity < 1:
                raise ValueError(f"a sparsity is between 0 and 1, such as 0.5, and not {sparsity}")
            return cls(float(sparsity))
        found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", str(pattern))
        kept, of = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < of:
            raise ValueError("a pattern names the weights that stay of every so many, such as 2:4, and not "
                             f"{pattern!r}")
        return cls(1 - kept / of, kept, of)

    def __str__(self) -> str:
        return f"{self.sparsity:g}" if self.kept is None else f"{self.kept}:{self.of}"

    def at(self, share: float) -> Pattern:
        """The pattern with another share of zeros; of every M weights in a row, as many are kept as come nearest."""
        if self.of is None:
            return Pattern(share)
        kept = self.of - round(share * self.of)
        return Pattern(1 - kept / self.of, kept, self.of)

    def check(self, width: int, name: str) -> None:
        """Raise `ValueError` if rows of a layer with so many inputs cannot be divided by the pattern."""
        if self.of is not None and width % self.of:
            raise ValueError(f"{name} has {width} inputs, which do not divide into groups of {self.of}")

    def largest(self, scores: torch.Tensor, per_row: bool = False) -> torch.Tensor:
        """The mask that keeps the weights of the largest scores.

        Args:
            scores: (outputs, inputs).
            per_row: whether each row has its own share of zeros; an N:M pattern counts within its groups anyway.

        Returns:
            (outputs, inputs) True where a weight is kept.
        """
        if self.of is not None and self.kept is not None:
            groups = scores.unflatten(1, (-1, self.of))
            return _top(groups, self.kept).flatten(1)
        rows = scores if per_row else scores.reshape(1, -1)
        return _top(rows, rows.shape[1] - round(self.sparsity * rows.shape[1])).view_as(scores)


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` largest scores along the last dimension."""
    places = scores.topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)

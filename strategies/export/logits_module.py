"""The part of a language model that is exported: token ids and positions in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Logits(nn.Module):
    """A causal language model with two inputs and one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(rows, length), (rows, length) -> (rows, length, vocabulary)"""
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


class ClassLogits(nn.Module):
    """A module around a classifier that returns its logits (batch, classes), or (batch, sequence, classes).

    Args:
        model: the classifier.
        names: names of its inputs, in the order in which this module takes them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None, third: torch.Tensor | None = None
                ) -> torch.Tensor:
        """The logits."""
        given = (one for one in (first, second, third) if one is not None)
        return self.model(**dict(zip(self.names, given, strict=True))).logits

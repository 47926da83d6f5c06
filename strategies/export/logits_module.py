"""The part of a language model that is exported: token ids and positions in, logits out."""

from __future__ import annotations

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

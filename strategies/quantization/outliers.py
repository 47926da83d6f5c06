"""Linear layers that multiply a few input columns with outliers in full precision and the others quantized."""

from __future__ import annotations

import torch
from torch import nn

from strategies.quantization.qat import Quantized

THRESHOLD = 6.0  # columns with larger magnitudes are outliers (Dettmers et al. 2022, section 3.2)


class OutlierLinear(Quantized, nn.Module):
    """A linear layer with some columns in full precision: W_hat x (without the outliers of x) + W_whole x[outliers].

    This is the decomposition of LLM.int8() (Dettmers et al. 2022, eq. 8), with columns found on calibration rows
    instead of in each batch. If activations are quantized, their scale is that of the other columns. In the outlier
    columns `weight` is zero, so that their numbers are zero or the zero point.

    An ONNX graph can hold it, as two products. compressed-tensors (and so a transformers folder) and GGUF have one type
    of number per layer and refuse it, as it is no `nn.Linear`. A plain layer with `effective_weight` computes the same
    unless activations are quantized.

    Attributes:
        outliers: (columns,) indices of input columns.
        whole: (outputs, columns) their weights.
    """

    outliers: torch.Tensor
    whole: nn.Parameter
    bias: nn.Parameter | None

    @property
    def effective_weight(self) -> torch.Tensor:
        """(outputs, inputs) weight, both parts combined."""
        return super().effective_weight.index_add(1, self.outliers, self.whole)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        rest = self.as_seen(input.index_fill(-1, self.outliers, 0.0))
        whole = nn.functional.linear(input.index_select(-1, self.outliers), self.whole)
        return nn.functional.linear(rest, super().effective_weight, self.bias) + whole


def outlier_columns(largest: torch.Tensor, threshold: float, name: str) -> torch.Tensor:
    """The columns (columns,) of a layer whose largest magnitude (inputs,) exceeds a threshold.

    Raises:
        ValueError: all of them do.
    """
    columns = (largest > threshold).nonzero().squeeze(1)
    if len(columns) == len(largest):
        raise ValueError(f"{name}: what enters each of its {len(largest)} columns is above {threshold:g} at times, so "
                         f"none is left to quantize; take a higher threshold, their median is {largest.median():.3g}")
    return columns


@torch.no_grad()
def keep_whole(layer: Quantized, columns: torch.Tensor) -> None:
    """Turn a quantized linear layer, in place, into one with these columns (columns,) in full precision."""
    layer.__class__ = OutlierLinear
    layer.register_buffer("outliers", columns)
    layer.whole = nn.Parameter(layer.weight[:, columns])
    layer.weight.index_fill_(1, columns, 0.0)

"""What pruning knows of the inputs of a layer: their second moment, in units in which all have the same size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class LayerInputs:
    """The inputs of one or several layers, scaled so that the diagonal of their damped second moment is one.

    With s the scale, weights are V = W s (a factor for each column). The squared error of a layer's outputs is then
    tr((V - V_0) moment (V - V_0)^T), and columns of small inputs are told from those of large ones by V alone.

    Attributes:
        scale: (inputs,) s, fp32.
        moment: (inputs, inputs) second moment in these units, damped, with a diagonal of ones, fp32.
    """

    scale: torch.Tensor
    moment: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor, damping: float = 0.01) -> LayerInputs:
        """From X^T X (inputs, inputs).

        Args:
            damping: fraction of the mean diagonal that is added to the diagonal, which makes the moment positive
                definite (Frantar and Alistarh 2023, section 3.4).

        Raises:
            ValueError: the damping is not above zero.
        """
        if not damping > 0:
            raise ValueError(f"a damping of {damping} cannot hold a second moment without full rank: take 0.01, or "
                             "more")
        damped = moment.double()
        mean = damped.diagonal().mean()
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)  # where no token says anything, all are the same
        scale = damped.diagonal().sqrt()
        return cls(scale.float(), (damped / scale / scale.unsqueeze(1)).float())

    @cached_property
    def eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (inputs,) and eigenvectors (inputs, inputs; in columns) of the moment."""
        return torch.linalg.eigh(self.moment)

    @cached_property
    def upper(self) -> torch.Tensor:
        """(inputs, inputs) upper triangular U with U^T U the inverse of the moment, computed in float64."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.moment.double()))
        return torch.linalg.cholesky(inverse, upper=True).float()

    def errors(self, difference: torch.Tensor) -> torch.Tensor:
        """(outputs,) squared errors of the outputs, from those of scaled weights (outputs, inputs)."""
        return (difference @ self.moment).mul_(difference).sum(1)


@torch.no_grad()
def output_error(weight: torch.Tensor, exact: torch.Tensor, moment: torch.Tensor) -> float | None:
    """||X (W - W_0)^T||^2 / ||X W_0^T||^2, from weights (outputs, inputs) and X^T X, not damped.

    None where the exact outputs are all zero.
    """
    difference, exact = (weight - exact).float(), exact.float()
    whole = float((exact @ moment).mul_(exact).sum(dtype=torch.float64))
    return float((difference @ moment).mul_(difference).sum(dtype=torch.float64)) / whole if whole > 0 else None

"""The best weights for a mask: least squares over those that are kept, by conjugate gradients."""

from __future__ import annotations

import torch

from strategies.pruning.unstructured.layer_inputs import LayerInputs

STEPS = 100  # most steps; the error falls in each
ENOUGH = 1e-5  # share of the error; a step that gains less is the last


@torch.no_grad()
def refit(weight: torch.Tensor, exact: torch.Tensor, mask: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
    """Kept weights that minimize the error of a layer's outputs, where all others are zero.

    With M the moment, row w of W solves M_KK (w - w_0)_K = M_KP w_0,P for its own kept columns K and pruned ones P. All
    rows are solved at once by conjugate gradients (Hestenes and Stiefel 1952), which need one product with M for each
    step, and no inverse for each row. Meng et al. 2024 (ALPS, arXiv 2406.07831, section 3.3) do so after their ADMM.

    Args:
        weight: (outputs, inputs) to begin with; what is not kept counts as zero.
        exact: (outputs, inputs) before pruning. Both are scaled, as `LayerInputs` has it.
        mask: (outputs, inputs) True where a weight is kept.
        inputs: of the layer.

    Returns:
        (outputs, inputs) scaled weights, zero where the mask is False, with an error no larger than before.
    """
    found = torch.where(mask, weight, 0.0)
    slope = (found - exact) @ inputs.moment
    residual = torch.where(mask, slope, 0.0).neg_()
    direction, squared = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(STEPS):
        moved = direction @ inputs.moment
        length = squared / (direction * moved).sum(1, keepdim=True).clamp_min(torch.finfo().tiny)
        found.addcmul_(length, direction)
        slope.addcmul_(length, moved)
        if float((length * squared).sum()) <= ENOUGH * float(((found - exact) * slope).sum()):
            break
        residual.addcmul_(length, torch.where(mask, moved, 0.0), value=-1)
        before, squared = squared, residual.square().sum(1, keepdim=True)
        direction.mul_(squared / before.clamp_min(torch.finfo().tiny)).add_(residual)
    return found

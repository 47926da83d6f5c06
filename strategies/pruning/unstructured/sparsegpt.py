"""SparseGPT: prune a layer column by column, compensate in the columns that follow, and then improve on that."""

from __future__ import annotations

import torch

from strategies.pruning.unstructured.alternating_directions import admm
from strategies.pruning.unstructured.kept_weights import refit
from strategies.pruning.unstructured.layer_inputs import LayerInputs
from strategies.pruning.unstructured.sparsity_pattern import Pattern

BLOCK = 128  # columns that share out their zeros among themselves, and whose errors are applied in one matrix product


@torch.no_grad()
def sparsegpt(weight: torch.Tensor, inputs: LayerInputs, pattern: Pattern) -> torch.Tensor:
    """Weights with the zeros of a pattern, at the least error of the layer's outputs that is found.

    The error is SparseGPT's, ||X (W - W_0)^T||^2, damped. Two masks are tried: that of ADMM
    (`alternating_directions.admm`), with the kept weights as the solution of least squares, and that of SparseGPT's
    pass over the columns, which sees each but once. Where the pass alone is as good, its kept weights are solved for,
    too, and taken: in single rows where rows do not share their zeros (N:M). So no layer is worse than by SparseGPT.

    Args:
        weight: (outputs, inputs).
        inputs: of the layer.
        pattern: what is kept.

    Returns:
        (outputs, inputs) fp32.
    """
    exact = weight.float() * inputs.scale
    found, passed = admm(exact, inputs, pattern), column_by_column(exact, inputs, pattern)
    found = refit(found, exact, found != 0, inputs)
    errors = torch.stack([inputs.errors(one - exact) for one in (passed, found)])
    better = errors[0] < errors[1] if pattern.of is not None else (errors[0].sum() < errors[1].sum()).expand(len(exact))
    if better.any():
        found[better] = refit(passed[better], exact[better], passed[better] != 0, inputs)
    return found / inputs.scale


@torch.no_grad()
def column_by_column(exact: torch.Tensor, inputs: LayerInputs, pattern: Pattern) -> torch.Tensor:
    """The pass of the paper (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1), on scaled weights.

    With U^T U the inverse of the moment, the score of a weight is w^2 / U_jj^2. A share of zeros is taken among all
    rows of a block of columns (adaptive selection, section 3.3), N:M within its groups when the first of their columns
    is reached.

    Args:
        exact: (outputs, inputs) scaled weights before pruning.
        inputs: of the layer.
        pattern: what is kept.

    Returns:
        (outputs, inputs) scaled weights with the zeros of the pattern.
    """
    work, upper = exact.clone(), inputs.upper
    mask = torch.ones_like(exact, dtype=torch.bool)
    block = BLOCK if pattern.of is None else -(-BLOCK // pattern.of) * pattern.of
    for start in range(0, exact.shape[1], block):
        end = min(start + block, exact.shape[1])
        errors = work.new_zeros(len(work), end - start)
        if pattern.of is None:
            mask[:, start:end] = _kept(work, upper, pattern, start, end)
        for place in range(start, end):
            if pattern.of is not None and place % pattern.of == 0:
                mask[:, place:place + pattern.of] = _kept(work, upper, pattern, place, place + pattern.of)
            error = torch.where(mask[:, place], 0.0, work[:, place]) / upper[place, place]
            work[:, place:end] -= error.outer(upper[place, place:end])
            errors[:, place - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return torch.where(mask, work, 0.0)


def _kept(work: torch.Tensor, upper: torch.Tensor, pattern: Pattern, start: int, end: int) -> torch.Tensor:
    """The mask of some columns, by the error that each of their weights would cause as zero."""
    return pattern.largest((work[:, start:end] / upper.diagonal()[start:end]).square())

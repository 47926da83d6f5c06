"""Masks by ADMM: all weights of a layer are moved towards a sparse copy of them, which follows."""

from __future__ import annotations

import torch

from strategies.pruning.unstructured.layer_inputs import LayerInputs
from strategies.pruning.unstructured.sparsity_pattern import Pattern

PENALTY = 0.1  # at the beginning, where the moment's diagonal is one
EVERY = 3  # iterations between changes of the penalty
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # from a share of kept weights that changed on: factor of the penalty
SETTLED = 0.001  # share of kept weights: where fewer change, the mask is as good as it gets
ITERATIONS = 600  # most; the penalty ends most layers after about 30


@torch.no_grad()
def admm(exact: torch.Tensor, inputs: LayerInputs, pattern: Pattern) -> torch.Tensor:
    """Sparse weights near those of the least error of a layer's outputs (Meng et al. 2024, ALPS, algorithm 1).

    The error of W is minimized subject to W = D, with D sparse. With M the moment, V the scaled weights before pruning,
    U the dual variable and rho the penalty, each iteration takes

        W = (V M + rho D - U) (M + rho)^-1,    D = the largest of W + U / rho,    U = U + rho (W - D)

    One eigendecomposition of M serves every rho. The penalty grows the faster, the more of the mask still changes; when
    hardly any of it does, that is the mask.

    Args:
        exact: (outputs, inputs) scaled weights before pruning.
        inputs: of the layer.
        pattern: what is kept.

    Returns:
        (outputs, inputs) scaled weights with the zeros of the pattern. Their values are not yet the best: see
        `kept_weights.refit`.
    """
    values, vectors = inputs.eigen
    target, dual, sparse = exact @ inputs.moment, torch.zeros_like(exact), exact
    penalty, before = PENALTY, None
    inverse = (vectors / (values + penalty)) @ vectors.T
    for iteration in range(1, ITERATIONS + 1):
        dense = (target + penalty * sparse - dual) @ inverse
        pulled = dense + dual / penalty
        mask = pattern.largest(pulled.abs())
        sparse = torch.where(mask, pulled, 0.0)
        dual += penalty * (dense - sparse)
        if iteration % EVERY:
            continue
        changed = 1.0 if before is None else float((mask & ~before).sum()) / int(mask.sum())
        if changed < SETTLED:
            break
        penalty *= next(factor for share, factor in GROWTH if changed >= share)
        inverse, before = (vectors / (values + penalty)) @ vectors.T, mask
    return sparse

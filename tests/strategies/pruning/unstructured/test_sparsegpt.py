"""SparseGPT against all masks, against its formulas in float64, and conjugate gradients against a solver."""

from itertools import combinations

import pytest
import torch

from strategies.pruning.unstructured.alternating_directions import admm
from strategies.pruning.unstructured.kept_weights import refit
from strategies.pruning.unstructured.layer_inputs import LayerInputs, output_error
from strategies.pruning.unstructured.sparsegpt import column_by_column, sparsegpt
from strategies.pruning.unstructured.sparsity_pattern import Pattern


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Rows (tokens, width) whose channels are of different sizes, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ (
        torch.eye(width) + 1.6 * torch.randn(width, width, generator=generator) / width**0.5)
    return mixed * torch.randn(width, generator=generator).exp()


def weights(outputs: int, width: int, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(outputs, width, generator=torch.Generator().manual_seed(1000 + seed))


def damped(moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    moment = moment.double()
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def error(found: torch.Tensor, exact: torch.Tensor, moment: torch.Tensor) -> float:
    apart = (found - exact).double()
    return float(((apart @ moment) * apart).sum())


def least(exact: torch.Tensor, mask: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) the solution of least squares for a mask, row by row in float64."""
    found = torch.zeros_like(exact, dtype=torch.float64)
    for row, kept in enumerate(mask):
        found[row, kept] = torch.linalg.solve(moment[kept][:, kept], (moment @ exact[row].double())[kept])
    return found


def best_of_all(exact: torch.Tensor, moment: torch.Tensor, pattern: Pattern) -> float:
    """The least error that any mask of a pattern allows: all masks of each row, and all ways to share out the zeros."""
    rows, width = exact.shape
    every = {count: [] for count in range(width + 1)}  # by weights kept: the best error of each row
    for count in every:
        masks = [torch.isin(torch.arange(width), torch.tensor(kept)) for kept in combinations(range(width), count)]
        if pattern.of is not None:
            masks = [mask for mask in masks if (mask.view(-1, pattern.of).sum(1) == pattern.kept).all()]
        for row in exact:
            every[count].append(min((error(least(row[None], mask[None], moment), row[None], moment) for mask in masks),
                                    default=torch.inf))
    if pattern.of is not None:
        return sum(every[width * pattern.kept // pattern.of])
    shared = {0: 0.0}  # by weights kept in the rows so far
    for row in range(rows):
        step: dict[int, float] = {}
        for before, sum_before in shared.items():
            for count in every:
                step[before + count] = min(step.get(before + count, torch.inf), sum_before + every[count][row])
        shared = step
    return shared[exact.numel() - round(pattern.sparsity * exact.numel())]


@pytest.mark.parametrize(("asked", "most"), [({"sparsity": 0.5}, 1.12), ({"sparsity": 0.7}, 1.1),
                                             ({"pattern": "2:4"}, 1.05), ({"pattern": "1:4"}, 1.2)], ids=str)
def test_tiny_layers_are_near_the_best_of_all_masks(asked, most):
    pattern, ratios, paper = Pattern.parse(**asked), [], []
    for seed in range(10):
        x, exact = inputs(60, 8, seed), weights(4, 8, seed)
        moment, seen = damped(x.T @ x), LayerInputs.of(x.T @ x)
        best = best_of_all(exact, moment, pattern)
        ratios.append(error(sparsegpt(exact, seen, pattern), exact, moment) / best)
        paper.append(error(column_by_column(exact * seen.scale, seen, pattern) / seen.scale, exact, moment) / best)
    assert min(ratios) > 1 - 1e-5 and sum(ratios) / 10 < most
    assert sum(paper) / 10 > 1.3, "there is something to gain"


def one_by_one(exact: torch.Tensor, moment: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and 4 of the paper in float64, for a mask: the inverse of what is left is made anew for every column."""
    work = exact.double().clone()
    for at in range(work.shape[1]):
        left = list(range(at, work.shape[1]))
        inverse = torch.linalg.inv(moment[left][:, left])
        error = torch.where(mask[:, at], 0.0, work[:, at]) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
    return torch.where(mask, work, 0.0)


@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "3:5"}], ids=str)
def test_the_pass_over_columns_is_the_papers(asked):
    x, exact, pattern = inputs(700, 260, 0), weights(6, 260, 0), Pattern.parse(**asked)
    seen = LayerInputs.of(x.T @ x)
    found = column_by_column(exact * seen.scale, seen, pattern) / seen.scale
    reference = one_by_one(exact, damped(x.T @ x), found != 0)
    torch.testing.assert_close(found.double(), reference, rtol=1e-3, atol=1e-4)
    if pattern.of is None:
        assert [float((part == 0).float().mean()) for part in found.split(128, 1)[:2]] == [0.5, 0.5]
    else:
        assert ((found != 0).view(6, -1, pattern.of).sum(-1) == pattern.kept).all()


def test_kept_weights_are_those_of_a_solver_in_float64():
    x, exact = inputs(300, 64, 1), weights(16, 64, 1)
    seen, mask = LayerInputs.of(x.T @ x), torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    found = refit(exact * seen.scale, exact * seen.scale, mask, seen) / seen.scale
    best = least(exact, mask, damped(x.T @ x))
    assert not found[~mask].any()
    assert error(found, exact, damped(x.T @ x)) < 1.001 * error(best, exact, damped(x.T @ x))


@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": "2:4"}], ids=str)
def test_no_layer_is_worse_than_by_the_paper_and_larger_ones_are_much_better(asked):
    pattern = Pattern.parse(**asked)
    for seed in range(3):
        x, exact = inputs(500, 96, seed), weights(48, 96, seed)
        seen = LayerInputs.of(x.T @ x)
        by_paper = column_by_column(exact * seen.scale, seen, pattern) / seen.scale
        found = sparsegpt(exact, seen, pattern)
        assert output_error(found, exact, x.T @ x) < 0.75 * output_error(by_paper, exact, x.T @ x)
        assert float((found == 0).float().mean()) == pytest.approx(pattern.sparsity, abs=1e-3)


def test_inputs_that_are_always_zero_are_pruned_first():
    x, exact, pattern = inputs(300, 32, 2), weights(8, 32, 2), Pattern.parse(0.5)
    x[:, [3, 20]] = 0
    found = sparsegpt(exact, LayerInputs.of(x.T @ x), pattern)
    assert found.isfinite().all() and not found[:, [3, 20]].any()
    found = sparsegpt(exact, LayerInputs.of(torch.zeros(32, 32)), pattern)
    torch.testing.assert_close(found, torch.where(pattern.largest(exact.abs()), exact, 0.0), msg="by magnitude then")


def test_admm_ends_with_a_mask_that_no_longer_changes():
    x, exact, pattern = inputs(500, 64, 3), weights(32, 64, 3), Pattern.parse(0.6)
    seen = LayerInputs.of(x.T @ x)
    found = admm(exact * seen.scale, seen, pattern)
    assert int((found == 0).sum()) == round(0.6 * found.numel())
    after = refit(found, exact * seen.scale, found != 0, seen)
    assert seen.errors(after - exact * seen.scale).sum() <= seen.errors(found - exact * seen.scale).sum()


def test_a_damping_of_zero_is_refused():
    with pytest.raises(ValueError, match="take 0.01, or more"):
        LayerInputs.of(torch.eye(4), 0.0)

"""GPTQ's rounding against brute force, and against its formulas carried out one by one in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from strategies.quantization.gptq import factorize, round_to_nearest, round_weights
from strategies.quantization.quantizer import Grid, WeightQuantizer

SCHEMES = [{"bits": bits, "symmetric": symmetric, **shape} for bits in (2, 3, 4, 8) for symmetric in (True, False)
           for shape in ({}, {"group_size": 32}, {"per_tensor": True})]
SCHEMES += [{"bits": 3, "rule": "mse"}, {"kind": "ternary"}, {"kind": "ternary", "rule": "mse", "group_size": 32},
            {"kind": "binary"}, {"kind": "fp8"}, {"bits": 4, "group_size": 32, "scale_dtype": torch.float16}]


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Rows (tokens, width) whose channels are of different sizes, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ (
        torch.eye(width) + 0.4 * torch.randn(width, width, generator=generator) / width**0.5 * 4)
    return mixed * torch.randn(width, generator=generator).exp()


def weights(outputs: int, width: int, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(outputs, width, generator=torch.Generator().manual_seed(1000 + seed))


def errors(x: torch.Tensor, exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(outputs,) ||X (w - w_hat)||^2"""
    return (x.double() @ (exact - found).double().T).square().sum(0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_output_is_worse_than_rounded_to_nearest_and_together_they_are_much_better(scheme, act_order):
    x, exact, quantizer = inputs(600, 96, 0), weights(24, 96, 0), WeightQuantizer(**scheme)
    found, grid = round_weights(exact, quantizer, factorize(x.T @ x, 1e-4, act_order))
    nearest = errors(x, exact, quantizer.fake_quantize(exact))
    assert (errors(x, exact, found) <= 1.01 * nearest).all()
    assert errors(x, exact, found).sum() < 0.75 * nearest.sum()
    for dtype in (torch.float32, torch.bfloat16):
        again = quantizer.dequantize(quantizer.numbers(found.to(dtype), grid), grid, torch.float32)
        differ = (again != found).float().mean()
        assert differ == 0 or scheme["bits"] == 8 and dtype is torch.bfloat16 and differ < 2e-3, "from weights on it"


@pytest.mark.parametrize(("scheme", "width", "mean", "before"), [
    ({"bits": 3}, 5, 1.4, 2.5), ({"bits": 2}, 7, 1.5, 2.2), ({"kind": "ternary"}, 8, 1.06, 1.3)])
def test_tiny_layers_are_near_the_best_of_all_choices(scheme, width, mean, before):
    quantizer, ratios, nearest = WeightQuantizer(**scheme), [], []
    levels = torch.arange(quantizer.lowest, quantizer.highest + 1, dtype=torch.float64)
    choices = torch.cartesian_prod(*[levels] * width)
    for seed in range(12):
        x, exact = inputs(40, width, seed), weights(6, width, seed)
        scale, moment = quantizer.grid(exact).scale.double(), (x.T @ x).double()
        apart = choices * scale[:, None] - exact.double()[:, None]  # (outputs, choices, width)
        best = ((apart @ moment) * apart).sum(-1).amin(1).sum()
        found, grid = round_weights(exact, quantizer, factorize(x.T @ x, 1e-6, act_order=True))
        assert torch.equal(grid.scale.double(), scale), "the same choices"
        ratios.append(float(errors(x, exact, found).sum() / best))
        nearest.append(float(errors(x, exact, quantizer.fake_quantize(exact)).sum() / best))
    assert min(ratios) > 1 - 1e-5 and sum(ratios) / 12 < mean
    assert sum(nearest) / 12 > before, "there is something to gain"


def one_by_one(exact: torch.Tensor, moment: torch.Tensor, quantizer: WeightQuantizer, order: list[int]) -> torch.Tensor:
    """Eq. 2 and 3 of the paper in float64: the inverse of what is left is made anew for every column."""
    work, found, left = exact.double().clone(), torch.zeros_like(exact).double(), list(order)
    grid = quantizer.grid(exact)
    column = WeightQuantizer(quantizer.bits, symmetric=quantizer.symmetric)
    while left:
        at, inverse = left[0], torch.linalg.inv(moment[left][:, left])
        group = at // (quantizer.group_size or exact.shape[1])
        part = Grid(*(None if of is None else of[:, group:group + 1] for of in grid))
        numbers = column.numbers(work[:, at:at + 1].float(), part)
        found[:, at] = column.dequantize(numbers, part, torch.float64).squeeze(1)
        work[:, left] -= ((work[:, at] - found[:, at]) / inverse[0, 0])[:, None] * inverse[0]
        left.pop(0)
    return found


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [{"bits": 3}, {"bits": 4, "group_size": 96}, {"bits": 3, "symmetric": False}])
def test_the_loop_is_that_of_the_paper(scheme, act_order):
    """Over more columns than go together."""
    x, exact, quantizer = inputs(500, 192, 1), weights(7, 192, 1), WeightQuantizer(**scheme)
    moment = (x.T @ x).double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(192)
    order = damped.diagonal().argsort(descending=True).tolist() if act_order else list(range(192))
    found, _ = round_weights(exact, quantizer, factorize(x.T @ x, 0.01, act_order), sweeps=0)
    wanted = one_by_one(exact, damped, quantizer, order)
    assert torch.isclose(found.double(), wanted, rtol=1e-4, atol=1e-7).float().mean() > 0.99


def test_sweeps_never_raise_the_error():
    x, exact, quantizer = inputs(400, 64, 2), weights(16, 64, 2), WeightQuantizer(2, 16)
    factor = factorize(x.T @ x, 1e-7, act_order=False)
    found = [errors(x, exact, round_weights(exact, quantizer, factor, sweeps)[0]) for sweeps in range(4)]
    for before, after in zip(found, found[1:], strict=False):
        assert (after <= before * (1 + 1e-4)).all()
    assert found[2].sum() < 0.9 * found[0].sum()


@settings(max_examples=60, deadline=None)
@given(some.integers(0, 10**6), some.sampled_from(SCHEMES), some.booleans(), some.integers(1, 80),
       some.lists(some.integers(0, 63), max_size=20, unique=True))
def test_any_layer_is_rounded(seed, scheme, act_order, tokens, whole):
    """Too few tokens for a full rank, channels that are always zero, columns that stay whole."""
    x, exact, quantizer = inputs(tokens, 64, seed), weights(3, 64, seed), WeightQuantizer(**scheme)
    x[:, seed % 64] = 0
    kept = torch.tensor(sorted(whole), dtype=torch.long)
    factor = factorize(x.T @ x, 0.01, act_order, kept)
    found, grid = round_weights(exact, quantizer, factor)
    nearest, _ = round_to_nearest(exact, quantizer, kept)
    moment = (x.T @ x).double()
    damped = moment + torch.diag(0.01 * moment.diagonal().mean() + (moment.diagonal() == 0).double())
    ours, theirs = ((((made - exact).double() @ damped) * (made - exact)).sum(1) for made in (found, nearest))
    assert found.isfinite().all() and (ours <= 1.02 * theirs + 1e-9).all()
    rest = torch.tensor([column not in whole for column in range(64)])
    again = quantizer.dequantize(quantizer.numbers(found, grid), grid, torch.float32)
    assert torch.equal(again[:, rest], found[:, rest])


def test_whole_columns_make_up_for_the_others():
    x, exact, quantizer = inputs(400, 64, 3), weights(8, 64, 3), WeightQuantizer(3)
    whole = torch.tensor([3, 17, 60])
    found, grid = round_weights(exact, quantizer, factorize(x.T @ x, 1e-6, whole=whole))
    kept = found.clone()
    kept[:, whole] = exact[:, whole]
    assert (errors(x, exact, found) < errors(x, exact, kept)).all()
    assert not torch.isclose(quantizer.dequantize(quantizer.numbers(found, grid), grid, torch.float32)[:, whole],
                             found[:, whole]).any()


def test_a_moment_without_damping_is_refused():
    with pytest.raises(ValueError, match="a damping of 0 cannot hold"):
        factorize(torch.eye(4), 0)

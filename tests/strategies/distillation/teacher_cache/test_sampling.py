"""Draws and top tokens of a teacher against the distribution itself, in float64."""

import math

import pytest
import torch
from scipy import stats

from strategies.distillation.teacher_cache.sampling import _drawn, draw_samples, sampled_targets, top_k


def teacher(rows: int, vocabulary: int = 40, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def counted(found: dict[str, torch.Tensor], vocabulary: int) -> torch.Tensor:
    """(rows, vocabulary) counts, written out."""
    rows = torch.repeat_interleave(torch.arange(len(found["distinct"])), found["distinct"])
    dense = torch.zeros(len(found["distinct"]), vocabulary, dtype=torch.float64)
    return dense.index_put_((rows, found["ids"]), found["counts"].double(), accumulate=True)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_draws_follow_the_softened_teacher_and_are_independent(temperature):
    """Pearson's statistic of all rows together, and of each row, both from above and from below, at 1 in 1000."""
    logits, rows, draws = teacher(1), 2000, 300
    found = draw_samples(logits.expand(rows, -1), draws, temperature, 0, torch.arange(rows))
    wanted = draws * torch.softmax(logits.double() / temperature, -1)
    counts = counted(found, 40)
    assert (counts.sum(-1) == draws).all()
    together = ((counts.sum(0) - rows * wanted[0])**2 / (rows * wanted[0])).sum()
    assert 0.0005 < stats.chi2.sf(float(together), 39) < 0.9995, "the mean of the draws is not the distribution"
    spread = ((counts - wanted)**2 / wanted).sum(-1).mean()
    # A row's statistic has mean V - 1 and variance 2 (V - 1) + (sum 1/p - V^2 - 2 V + 2) / N (Haldane 1937).
    variance = 2 * 39 + (float((draws / wanted).sum()) - 40**2 - 2 * 40 + 2) / draws
    assert abs(float(spread) - 39) < 3.3 * math.sqrt(variance / rows), "draws of a row, or rows, depend on each other"


def test_draws_of_different_rows_are_uncorrelated():
    """Neighboring positions of one distribution, against each other."""
    found = draw_samples(teacher(1, vocabulary=5).expand(4000, -1), 7, 1.0, 3, torch.arange(4000))
    counts = counted(found, 5)
    centred = counts - counts.mean(0)
    correlation = (centred[1:] * centred[:-1]).mean(0) / centred.square().mean(0)
    assert (correlation.abs() < 4 / math.sqrt(4000)).all()


def test_rare_tokens_are_drawn_at_their_rate():
    """A cumulative sum in fp32 knows no token under 6e-8 there: one of eight would be drawn in the place of all."""
    tail, draws, rows = 2**17, 2**16, 32
    logits = torch.full((1, tail + 1), math.log(0.001 / tail))
    logits[0, 0] = math.log(0.999)
    found = draw_samples(logits.expand(rows, -1), draws, 1.0, 0, torch.arange(rows))
    rare = found["ids"][found["ids"] > 0]
    number = len(rare)
    assert abs(number - 0.001 * draws * rows) < 4 * math.sqrt(0.001 * draws * rows)
    repeated = number - len(rare.unique())
    assert repeated < number**2 / (2 * tail) + 4 * math.sqrt(number**2 / (2 * tail))


def test_draws_depend_on_seed_and_number_alone():
    logits, numbers = teacher(9), torch.tensor([5, 6, 7, 100, 3, 4, 2**40, 2**40 + 1, 8])
    whole = draw_samples(logits, 50, 1.0, 1, numbers)
    counts = counted(whole, 40)
    for row in range(9):
        alone = draw_samples(logits[row:row + 1], 50, 1.0, 1, numbers[row:row + 1])
        assert torch.equal(counted(alone, 40)[0], counts[row])
    order = torch.tensor([3, 8, 0, 2, 1, 6, 7, 5, 4])
    assert torch.equal(counted(draw_samples(logits[order], 50, 1.0, 1, numbers[order]), 40), counts[order])
    assert not torch.equal(counted(draw_samples(logits, 50, 1.0, 2, numbers), 40), counts)
    same = counted(draw_samples(logits[:1].expand(9, -1), 50, 1.0, 1, numbers), 40)
    assert len(same.unique(dim=0)) == 9, "two positions were given the same draws"


def test_blocks_of_rows_change_nothing():
    """A vocabulary so large that 6 rows take two blocks."""
    logits = teacher(6, vocabulary=2**21).bfloat16()
    sampled, top = draw_samples(logits, 20, 1.0, 0, torch.arange(6)), top_k(logits, 8, 1.0)
    start = 0
    for row in range(6):
        alone = draw_samples(logits[row:row + 1], 20, 1.0, 0, torch.tensor([row]))
        stop = start + int(sampled["distinct"][row])
        assert all(torch.equal(sampled[name][start:stop], alone[name]) for name in ("ids", "counts", "log_p"))
        start = stop
        best = top_k(logits[row:row + 1], 8, 1.0)
        assert all(torch.equal(top[name][row], values[0]) for name, values in best.items())
    logits[5, 3] = torch.nan
    with pytest.raises(ValueError, match="logits of row 5 make no distribution"):
        top_k(logits, 8, 1.0)


def test_log_probabilities_are_those_of_the_softened_teacher():
    logits = teacher(30, spread=8.0)
    found = draw_samples(logits, 16, 2.0, 0, torch.arange(30))
    rows = torch.repeat_interleave(torch.arange(30), found["distinct"])
    wanted = torch.log_softmax(logits.double() / 2, -1)[rows, found["ids"]]
    assert found["log_p"].dtype == torch.float32
    assert torch.allclose(found["log_p"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_identical_models_have_no_divergence_and_the_gradient_is_unbiased():
    """Silent error 7, for the padded form: value sum share (log p - log q), gradient q - share."""
    logits = teacher(1).expand(3000, -1)
    targets = sampled_targets(draw_samples(logits, 20, 2.0, 0, torch.arange(3000)), 20, 2.0)
    q = torch.softmax(logits.double() / 2, -1)
    assert targets.temperature == 2 and targets.ids.shape == targets.shares.shape == targets.log_p.shape
    assert torch.allclose(targets.shares.sum(-1), torch.ones(3000))
    value = (targets.shares * (targets.log_p - q.log().gather(-1, targets.ids))).sum(-1)
    assert value.abs().max() < 1e-6
    gradient = q.scatter_add(-1, targets.ids, -targets.shares.double()).mean(0)
    assert (gradient.abs() < 4.5 * (q[0] * (1 - q[0]) / (20 * 3000)).sqrt()).all()


def test_padding_looks_at_no_token_that_was_not_drawn():
    logits = torch.full((2, 6), -torch.inf)
    logits[0, 2:] = 0
    logits[1, 4] = 0
    targets = sampled_targets(draw_samples(logits, 40, 1.0, 0, torch.arange(2)), 40, 1.0)
    assert targets.ids[0].tolist() == [2, 3, 4, 5] and targets.log_p.isfinite().all()
    assert targets.ids[1].tolist() == [4] * 4 and targets.shares[1].tolist() == [1, 0, 0, 0]


def test_the_ends_of_the_cumulative_sum_draw_tokens_that_can_be():
    """0 and the last number below 1, which hardly ever come, with tokens of probability 0 at both ends."""
    log_p = torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.0]]).log()
    found = _drawn(log_p, torch.tensor([[0.0, 0.6, 1 - 2.0**-53]], dtype=torch.float64))
    assert found["ids"].tolist() == [1, 2, 3] and found["counts"].tolist() == [1, 1, 1]


def test_many_draws_of_a_small_vocabulary():
    found = draw_samples(teacher(3, vocabulary=4, spread=0.1), 100_000, 1.0, 0, torch.arange(3))
    assert found["distinct"].tolist() == [4, 4, 4]
    assert found["counts"].view(3, 4).sum(-1).tolist() == [100_000] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_and_its_tail_are_the_definition(dtype):
    logits = teacher(20, vocabulary=500, spread=4.0).to(dtype)
    found = top_k(logits, 10, 1.5)
    exact = torch.log_softmax(logits.double() / 1.5, -1)
    ordered = exact.sort(-1, descending=True).values
    assert torch.allclose(found["log_p"].double(), ordered[:, :10], rtol=1e-6, atol=1e-6)
    assert torch.allclose(exact.gather(-1, found["ids"]), ordered[:, :10], rtol=1e-6)
    assert torch.allclose(found["log_tail"].double(), ordered[:, 10:].logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_a_tail_below_the_last_digit_is_kept():
    """As 1 - sum of the first k, a tail of 1e-13 would be 0 or worse in fp32."""
    logits = torch.full((1, 1001), -40.0)
    logits[0, 17] = 0.0
    found = top_k(logits, 1, 1.0)
    assert found["ids"].tolist() == [[17]]
    assert float(found["log_tail"]) == pytest.approx(math.log(1000) - 40, abs=1e-5)


@pytest.mark.parametrize("k", [40, 41, 1000])
def test_k_of_the_whole_vocabulary_leaves_no_tail(k):
    found = top_k(teacher(3), k, 1.0)
    assert found["ids"].shape == (3, 40) and (found["log_tail"] == -torch.inf).all()
    assert torch.allclose(found["log_p"].double().exp().sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_no_rows_give_no_rows():
    found = draw_samples(torch.zeros(0, 9), 5, 1.0, 0, torch.zeros(0, dtype=torch.long))
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "distinct": (0,), "ids": (0,), "counts": (0,), "log_p": (0,)}
    assert sampled_targets(found, 5, 1.0).ids.shape == (0, 0)
    assert top_k(torch.zeros(0, 9), 5, 1.0)["ids"].shape == (0, 5)


@pytest.mark.parametrize("broken", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_without_a_distribution_are_refused(broken):
    logits = torch.tensor([[0.0, 1.0], broken])
    with pytest.raises(ValueError, match="logits of row 1 make no distribution.*float16 needs bfloat16 or float32"):
        draw_samples(logits, 5, 1.0, 0, torch.arange(2))
    with pytest.raises(ValueError, match="logits of row 1 make no distribution"):
        top_k(logits, 1, 1.0)


def test_numbers_out_of_range_are_named():
    logits, numbers = teacher(2), torch.arange(2)
    with pytest.raises(ValueError, match="draws is an integer from 1 on, not 0"):
        draw_samples(logits, 0, 1.0, 0, numbers)
    with pytest.raises(ValueError, match="k is an integer from 1 on, not -1"):
        top_k(logits, -1, 1.0)
    with pytest.raises(ValueError, match="temperature is a number above zero, not 0.0"):
        top_k(logits, 1, 0.0)
    with pytest.raises(ValueError, match="seed is an integer from 0 on, not -3"):
        draw_samples(logits, 5, 1.0, -3, numbers)
    with pytest.raises(ValueError, match=r"logits are of shape \(2, 1, 40\), and \(rows, vocabulary\) is expected"):
        top_k(logits[:, None], 1, 1.0)
    for wrong in (torch.arange(3), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"do not number the rows of logits of shape \(2, 40\): give one from 0"):
            draw_samples(logits, 5, 1.0, 0, wrong)

"""Confidence intervals against scipy's, and by how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import binomtest

from trainer.evaluate.intervals import difference, interval, value_of, wilson


def test_shares_have_wilsons_interval():
    for count, total in ((0, 5), (3, 10), (50, 99), (7, 7)):
        theirs = binomtest(count, total).proportion_ci(method="wilson")
        assert wilson(count, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert interval([(1.0, 1.0), (0.0, 1.0)]) == wilson(1, 2)


def test_a_paired_difference_holds_the_truth_about_as_often_as_it_says():
    drawn, covered, narrower = np.random.default_rng(3), 0, 0
    for _ in range(400):
        first = drawn.random(80) < 0.4
        second = np.where(drawn.random(80) < 0.7, first, drawn.random(80) < 0.5)  # shares of 0.4 and 0.43
        ours, theirs = ([(float(one), 1.0) for one in own] for own in (first, second))
        found, low, high = difference(ours, theirs)
        assert found == pytest.approx(value_of(ours) - value_of(theirs)) and low <= found <= high
        covered += low <= -0.03 <= high
        (a, b), (c, d) = interval(ours), interval(theirs)
        narrower += high - low < np.hypot(b - a, d - c)
    assert 0.92 < covered / 400 < 0.99 and narrower == 400, "what both get right says nothing on which is better"


def test_rates_are_resampled_by_records_and_their_difference_in_pairs():
    drawn = np.random.default_rng(0)
    sizes = drawn.integers(20, 60, 200)
    bits = sizes * (1.5 + 0.3 * drawn.standard_normal(200))
    ours = [(float(one), float(size)) for one, size in zip(bits, sizes, strict=True)]
    theirs = [(one + 0.01 * size, size) for one, size in ours]
    value, (low, high) = value_of(ours), interval(ours)
    rate, error = bits.sum() / sizes.sum(), 0.3 * np.sqrt((sizes**2).sum()) / sizes.sum()
    assert value == pytest.approx(rate) and high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert difference(ours, theirs) == pytest.approx((-0.01, -0.01, -0.01))

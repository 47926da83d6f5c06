"""Confidence intervals of what models reach on a task, and of how two models differ on the same records."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # 95% of a normal distribution is within so many standard deviations
RESAMPLES = 2000
Outcomes = Sequence[tuple[float, float]]  # of each record: what was reached, of how much


def value_of(outcomes: Outcomes) -> float:
    """The metric over all records: the sum of what was reached, divided by the sum of its weights."""
    return math.fsum(part for part, _ in outcomes) / math.fsum(whole for _, whole in outcomes)


def interval(outcomes: Outcomes) -> tuple[float, float]:
    """95% interval: Wilson's for a share of records, else a bootstrap over records.

    Args:
        outcomes: of each record, (1 or 0, 1) for a share, or (bits, bytes) for a rate.
    """
    if _is_share(outcomes):
        return wilson(round(sum(part for part, _ in outcomes)), len(outcomes))
    pairs = np.asarray(outcomes, dtype=np.float64)
    return _percentiles(_resampled(pairs))


def difference(ours: Outcomes, theirs: Outcomes) -> tuple[float, float, float]:
    """(difference, low, high) of two models' values on the same records, with a 95% interval of the paired difference.

    Newcombe's method 10 (Statistics in Medicine 17:2635, 1998) for shares, else a bootstrap that draws the same records
    for both.
    """
    found = value_of(ours) - value_of(theirs)
    if _is_share(ours) and _is_share(theirs):
        return (found, *_newcombe(ours, theirs))
    drawn = [np.asarray(one, dtype=np.float64) for one in (ours, theirs)]
    return (found, *_percentiles(_resampled(drawn[0]) - _resampled(drawn[1])))


def wilson(count: int, total: int) -> tuple[float, float]:
    """95% interval of a share `count / total` (Wilson 1927, JASA 22:209)."""
    share, spread = count / total, Z * Z / total
    middle = share + spread / 2
    reach = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (middle - reach) / (1 + spread) if count else 0.0, (middle + reach) / (1 + spread) if count < total else 1.0


def _is_share(outcomes: Outcomes) -> bool:
    return all(whole == 1 and part in (0, 1) for part, whole in outcomes)


def _newcombe(ours: Outcomes, theirs: Outcomes) -> tuple[float, float]:
    """95% interval of the difference of two shares of the same records."""
    total = len(ours)
    both = sum(1 for (one, _), (other, _) in zip(ours, theirs, strict=True) if one and other)
    first, second = (round(sum(part for part, _ in one)) for one in (ours, theirs))
    neither = total - first - second + both
    product, margins = both * neither - (first - both) * (second - both), (
        first * (total - first) * second * (total - second))
    linked = max(product - total / 2, 0) if product > 0 else product  # with a continuity correction
    phi = linked / math.sqrt(margins) if margins else 0.0
    (low, high), (low_2, high_2) = wilson(first, total), wilson(second, total)
    share, share_2 = first / total, second / total
    below = _joined(share - low, high_2 - share_2, phi)
    above = _joined(high - share, share_2 - low_2, phi)
    return max(-1.0, share - share_2 - below), min(1.0, share - share_2 + above)


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))


def _resampled(pairs: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) values of samples drawn with replacement; the same records for every model of as many records."""
    drawn = np.random.default_rng(0)
    values = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        part, whole = pairs[drawn.integers(len(pairs), size=len(pairs))].sum(0)
        values[number] = part / whole
    return values


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

"""Weight sharing by clustering, and relative positions of unpruned weights (Han et al. 2016, sections 2 and 3)."""

from __future__ import annotations

import numpy


def cluster(values: numpy.ndarray, levels: int, iterations: int = 300) -> tuple[numpy.ndarray, numpy.ndarray]:
    """One-dimensional k-means, initialized with evenly spaced centroids (Han et al. 2016, section 3.2).

    Lloyd's algorithm, until no value changes its cluster. In one dimension, clusters are runs of the sorted values, so
    that an iteration only needs a binary search for each boundary. Clusters that end up empty are dropped.

    Args:
        values: (count,), finite.
        levels: largest number of clusters.
        iterations: most iterations.

    Returns:
        Centroids in ascending order, float64, and the cluster of each value, uint16.
    """
    ordered = numpy.sort(values.astype(numpy.float64))
    sums = numpy.concatenate([[0.0], numpy.cumsum(ordered)])
    centroids, before = numpy.linspace(ordered[0], ordered[-1], levels), None
    for _ in range(iterations):
        ends = numpy.concatenate([[0], numpy.searchsorted(ordered, _edges(centroids)), [len(ordered)]])
        if before is not None and numpy.array_equal(before, ends):
            break
        counts, before = numpy.diff(ends), ends
        centroids = numpy.where(counts > 0, numpy.diff(sums[ends]) / numpy.maximum(counts, 1), centroids)
    index = numpy.searchsorted(_edges(centroids), values.astype(numpy.float64), side="right")
    used = numpy.bincount(index, minlength=levels) > 0
    return centroids[used], (numpy.cumsum(used) - 1)[index].astype(numpy.uint16)


def _edges(centroids: numpy.ndarray) -> numpy.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2


def commonest_first(index: numpy.ndarray, levels: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Sort a codebook by frequency, most frequent first: its new order [levels], and the new indices (count,)."""
    order = numpy.argsort(-numpy.bincount(index, minlength=levels), stable=True)
    places = numpy.empty(levels, dtype=numpy.uint16)
    places[order] = numpy.arange(levels)
    return order, places[index]


def relative_positions(places: numpy.ndarray, total: int, span: int) -> numpy.ndarray:
    """Relative positions (Han et al. 2016, section 2): a gap below span - 1 is that many zeros followed by a weight.

    A gap of span - 1 is a filler: that many zeros without a weight, where the paper inserts a weight of zero. Trailing
    zeros take fillers too, so that the gaps determine the length of the tensor.

    Args:
        places: (count,) positions of nonzero weights, ascending, at least one.
        total: number of weights including zeros.
        span: one more than the largest gap.
    """
    skipped = numpy.diff(places, prepend=-1) - 1
    tail = total - 1 - int(places[-1])
    fillers = numpy.append(skipped // (span - 1), tail // (span - 1))
    gaps = numpy.full(int(fillers.sum()) + len(places), span - 1, dtype=numpy.uint16)
    gaps[numpy.cumsum(fillers[:-1] + 1) - 1] = skipped % (span - 1)
    return gaps


def positions(gaps: numpy.ndarray, total: int, span: int) -> numpy.ndarray:
    """Positions of the nonzero weights: the inverse of `relative_positions`.

    Raises:
        ValueError: the gaps do not end where a tensor of `total` does.
    """
    filler = gaps == span - 1
    after = numpy.cumsum(gaps.astype(numpy.int64) + ~filler)
    end = int(after[-1]) if len(after) else 0
    if not end <= total < end + span - 1:
        raise ValueError(f"positions of weights end at {end:,}, the tensor has {total:,}")
    return after[~filler] - 1

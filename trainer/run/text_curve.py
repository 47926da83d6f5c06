"""Curves as text: Braille characters, each of which has two by four dots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of U+2800: left column from the top, then the right one
LABEL = 9  # columns of the labels at the left


def text_curve(points: Sequence[tuple[float, float]], columns: int, rows: int, last: float | None = None) -> list[str]:
    """Draw a curve through points, as lines of text, with the least and the largest value and x at its ends.

    Points that share a dot's column are averaged; between points the line is straight. Values that are not finite are
    left out.

    Args:
        points: (x, y), by rising x.
        columns: of text, labels included.
        rows: of text, the labels of x not counted.
        last: x at the right end; None for that of the last point.

    Returns:
        `rows` + 1 lines of at most `columns` characters; none if no value is finite.
    """
    given = np.array([point for point in points if np.isfinite(point).all()], dtype=float).reshape(-1, 2)
    if not len(given):
        return []
    width, height = 2 * max(1, columns - LABEL), 4 * rows
    first, last = given[0, 0], max(given[-1, 0], last if last is not None else -np.inf)
    at = np.minimum((given[:, 0] - first) / max(last - first, 1e-9) * width, width - 1).astype(int)
    count = np.bincount(at, minlength=width)
    there = np.flatnonzero(count)
    means = np.bincount(at, given[:, 1], minlength=width)[there] / count[there]
    every = np.interp(np.arange(there[-1] + 1), there, means)
    low, high = means.min(), means.max()
    level = np.rint((high - every) / max(high - low, 1e-12) * (height - 1)).astype(int) if high > low else np.full(
        len(every), height // 2)
    cells = np.zeros((rows, width // 2), dtype=int)
    for column, (now, before) in enumerate(zip(level, [level[0], *level[:-1]], strict=True)):
        for dot in _between(now, before):
            cells[dot // 4, column // 2] |= DOTS[column % 2][dot % 4]
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    labels = [f"{high:.4g}", *[""] * (rows - 2), f"{low:.4g}"] if rows > 1 else [f"{high:.4g}"]
    ends = f"{first:.0f}", f"{last:.0f}"
    return [*(f"{label:>{LABEL - 1}} {line}" for label, line in zip(labels, lines, strict=True)),
            " " * LABEL + ends[0] + ends[1].rjust(width // 2 - len(ends[0]))]


def _between(now: int, before: int) -> range:
    """The dots of a column: where the curve is, and what joins it to the column before."""
    return range(now, now + 1) if now == before else range(now, before) if now < before else range(before + 1, now + 1)

"""Margin for what counting tensors misses, such as small temporaries and kernels' own buffers.

It is a share of the memory allocated during the step, plus 96 KiB or 1% of that memory, whichever is less.
"""

from __future__ import annotations

MARGIN_SHARE, MARGIN_BYTES, MARGIN_OF_SMALL = 0.003, 98_304, 0.01


def with_margin(count: int, base: int) -> int:
    """Counted bytes of which `base` are held when a step begins, with the margin."""
    moving = count - base
    return count + int(MARGIN_SHARE * moving + min(MARGIN_BYTES, MARGIN_OF_SMALL * moving))


def without_margin(budget: int, base: int) -> int:
    """The most counted bytes that are within a budget with the margin."""
    moving = budget - base
    return base + int(max((moving - MARGIN_BYTES) / (1 + MARGIN_SHARE),
                          moving / (1 + MARGIN_SHARE + MARGIN_OF_SMALL))) - 1

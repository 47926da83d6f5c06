"""Floats in the order of integers, for compiled loops: a maximum of integers is a vector instruction.

One of floats is none, since NaN is neither more nor less than a number, so that the order of comparisons matters.
"""

from __future__ import annotations

import numpy as np

from strategies.common.compiled import compiled

_inlined = compiled(fastmath={"contract"}, error_model="numpy", forceinline=True)

SIGN, MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
LOWEST_ORDER, HIGHEST_ORDER = np.int32(-(2**31)), np.int32(2**31 - 1)  # the ends of 32 bits


@_inlined
def order_of_bits(bits):
    """An integer that is larger where the float of these 32 bits is, and beyond all numbers' for NaN; its own inverse.

    The magnitude of negative floats grows downward, and is inverted.
    """
    return np.int32(bits ^ np.int32(np.int32(bits >> SIGN) & MAGNITUDE))


@_inlined
def order(x):
    """`order_of_bits` of a float."""
    return order_of_bits(np.float32(x).view(np.int32))


@_inlined
def unorder(key):
    """The float of an `order`."""
    return np.int32(order_of_bits(key)).view(np.float32)

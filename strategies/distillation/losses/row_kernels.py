"""Values and gradients of the response loss, a row of logits at a time: compiled loops over a row that is in the cache.

Each kernel overwrites student logits (rows, vocabulary) with the gradient of the weighted loss with respect to what the
head multiplied, and writes each row's terms to `values`. A row is read three or four times, and nothing is allocated.
The mathematics, and what keeps it exact where student and teacher nearly agree, is that of `divergences`, with the same
names: d = log p - log q. Terms of a row are summed in single precision over `CHUNK` elements and then in double.

Kernels release the interpreter's lock and are called for a few rows at a time from several threads
(`fused_rows.py`). A row's numbers depend on nothing but that row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from strategies.common.compiled import compiled
from strategies.common.float_order import HIGHEST_ORDER, LOWEST_ORDER, order, unorder
from strategies.distillation.losses.row_math import (
    ONE,
    ZERO,
    beyond_line,
    exact,
    exponential,
    growth,
    single,
)

FAST = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
kernel, fast = compiled(**FAST), compiled(**FAST, forceinline=True)

CHUNK = 512


class Text(NamedTuple):
    """Weights of the terms that need no teacher: cross-entropy, label smoothing's share, z-loss."""

    cross_entropy: float
    smoothing: float
    z_loss: float


class Shape(NamedTuple):
    """What lies between products and logits: the inverse of the soft cap (0 without one) and the scale."""

    inverse_cap: np.float32
    scale: np.float32


class Taught(NamedTuple):
    """`first` KL(p || m) + `second` KL(q || m) with m = `share` p + (1 - share) q, or a divergence without a mixture.

    Attributes:
        kind: one of `slope_kernels`; forward KL has a kernel of its own, which asks for none.
        inverse: 1 / temperature.
        factor: of the gradient with respect to the logits.
    """

    kind: int
    first: np.float32
    second: np.float32
    share: np.float32
    inverse: np.float32
    factor: float


class Row(NamedTuple):
    """Of one row: largest logits, inverse normalizers, offset with d = (teacher - student) / T - offset, slope of text.

    Attributes:
        top, top_teacher: the largest logits.
        one: 1 / sum exp(student - top), at temperature 1.
        student, teacher: the same at the divergence's temperature.
        offset, offset_low: their sum, of which the first is rounded.
        slope: what the gradient has of the student's probabilities at temperature 1.
        even: what it has less at every token.
    """

    top: np.float32
    top_teacher: np.float32
    one: np.float32
    student: np.float32
    teacher: np.float32
    offset: np.float32
    offset_low: np.float32
    slope: np.float32
    even: np.float32


@exact
def log_ratio(student, teacher, inverse, row):
    """d = log p - log q of a token; where d is near 0, nothing is rounded before the last subtraction."""
    return ((teacher - student) * inverse - row.offset) - row.offset_low


@exact
def difference(student, teacher, inverse, offset):
    """(teacher - student) / T - offset."""
    return (teacher - student) * inverse - offset


@fast
def largest(row):
    """The largest logit; NaN if there is one."""
    key = LOWEST_ORDER
    for index in range(row.size):
        key = max(key, order(row[index]))
    return unorder(key)


@fast
def normalizer(row, top, inverse):
    """Sum of exp((row - top) / T), in double: beside the top's 1, single precision would lose a part of the others."""
    total = 0.0
    for index in range(row.size):
        total += float(exponential((row[index] - top) * inverse))
    return total


@fast
def spread(student, teacher, inverse):
    """The smallest and the largest of (teacher - student) / T."""
    low, high = HIGHEST_ORDER, LOWEST_ORDER
    for index in range(student.size):
        key = order(difference(student[index], teacher[index], inverse, ZERO))
        low, high = min(low, key), max(high, key)
    return unorder(low), unorder(high)


@fast
def close_offset(student, teacher, top, inverse, inverse_total):
    """c + log1p(sum q expm1(e - c)) with e = (teacher - student) / T and c = sum q e: see `divergences._refined`.

    The sum's first-order part is known from c, which is summed in double: a token whose d is next to nothing gets the
    right sign.
    """
    middle = 0.0
    for index in range(student.size):
        q = exponential((student[index] - top) * inverse)
        middle += float(q) * float(difference(student[index], teacher[index], inverse, ZERO))
    middle *= inverse_total
    center, more = single(middle), 0.0
    for begin in range(0, student.size, CHUNK):
        part, mine, theirs = ZERO, student[begin:begin + CHUNK], teacher[begin:begin + CHUNK]
        for index in range(mine.size):
            q = exponential((mine[index] - top) * inverse)
            part += q * beyond_line(difference(mine[index], theirs[index], inverse, center))
        more += part
    return center + math.log1p(middle - center + more * inverse_total)


@fast
def total_of(row):
    """The sum of a row's logits."""
    total = 0.0
    for begin in range(0, row.size, CHUNK):
        part, logits = ZERO, row[begin:begin + CHUNK]
        for index in range(logits.size):
            part += logits[index]
        total += part
    return total


@fast
def text_values(student, target, log_z, text, values):
    """Cross-entropy and squared log-normalizer of a row; returns the slope of its softmax, and what is even."""
    value = log_z - student[target]
    if text.smoothing:
        value = (1 - text.smoothing) * value + text.smoothing * (log_z - total_of(student) / student.size)
    values[0], values[1] = value, log_z * log_z
    return text.cross_entropy + 2 * text.z_loss * log_z, text.cross_entropy * text.smoothing / student.size


@fast
def at_target(student, target, before, text, shape):
    """Add what the gradient has at the target alone; `before` is its logit."""
    less = single(text.cross_entropy * (1 - text.smoothing)) * (ONE - (before * shape.inverse_cap) ** 2) * shape.scale
    student[target] -= less


@fast
def text_row(student, target, text, shape, values, gradient):
    """A row without a teacher. `values`: (3,) double: cross-entropy, z-loss, divergence."""
    top = largest(student)
    total = normalizer(student, top, ONE)
    slope, even = text_values(student, target, top + math.log(total), text, values)
    values[2] = 0.0
    if not gradient:
        return
    before, weight, less = student[target], single(slope / total), single(even)
    for index in range(student.size):
        logit = student[index]
        by = exponential(logit - top) * weight - less
        student[index] = by * (ONE - (logit * shape.inverse_cap) ** 2) * shape.scale
    at_target(student, target, before, text, shape)


@kernel
def text_rows(logits, targets, begin, end, text, shape, values, gradient):
    """Rows without a teacher. `values`: (rows, 3) double."""
    for number in range(begin, end):
        text_row(logits[number], targets[number], text, shape, values[number], gradient)


@fast
def prepared(student, teacher, target, text, inverse, values):
    """A row's `Row`; its terms of the text are written to `values`."""
    top, top_teacher = largest(student), largest(teacher)
    total, total_teacher = normalizer(student, top, inverse), normalizer(teacher, top_teacher, inverse)
    one = total if inverse == ONE else normalizer(student, top, ONE)
    slope, even = text_values(student, target, top + math.log(one), text, values)
    offset = (float(top_teacher) - float(top)) * inverse + math.log(total_teacher) - math.log(total)
    low, high = spread(student, teacher, inverse)
    if max(abs(low - offset), abs(high - offset)) < 1:
        offset = close_offset(student, teacher, top, inverse, 1 / total)
    return Row(top, top_teacher, single(1 / one), single(1 / total), single(1 / total_teacher), single(offset),
               single(offset - float(single(offset))), single(slope), single(even))


@exact
def q_minus_p(p, q, d):
    """q - p without cancellation."""
    shrunk = growth(-abs(d))
    return p * shrunk if d > ZERO else -q * shrunk


@kernel
def forward_kl_rows(logits, teachers, asked, targets, begin, end, text, taught, shape, values, gradient):
    """Rows with KL(p || q) = sum p d + (q - p), whose gradient is q - p."""
    inverse, factor = taught.inverse, single(taught.factor)
    for number in range(begin, end):
        student, teacher, target = logits[number], teachers[number], targets[number]
        if not asked[number]:
            text_row(student, target, text, shape, values[number], gradient)
            continue
        row = prepared(student, teacher, target, text, inverse, values[number])
        before, value = student[target], 0.0
        for start in range(0, student.size, CHUNK):
            part, mine, theirs = ZERO, student[start:start + CHUNK], teacher[start:start + CHUNK]
            for index in range(mine.size):
                logit = mine[index]
                d = log_ratio(logit, theirs[index], inverse, row)
                p = exponential((theirs[index] - row.top_teacher) * inverse) * row.teacher
                q = exponential((logit - row.top) * inverse) * row.student
                by = q_minus_p(p, q, d)
                near = abs(d) < ONE
                part += p * beyond_line(-d if near else ZERO) if near else p * d + by
                if gradient:
                    by = by * factor + exponential(logit - row.top) * row.one * row.slope - row.even
                    mine[index] = by * (ONE - (logit * shape.inverse_cap) ** 2) * shape.scale
            value += part
        values[number, 2] = value
        if gradient:
            at_target(student, target, before, text, shape)

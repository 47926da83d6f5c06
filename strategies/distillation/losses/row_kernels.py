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
from strategies.distillation.losses.row_math import (
    ONE,
    ZERO,
    below_line,
    beyond_line,
    exact,
    exponential,
    growth,
    log_of_one_more,
    single,
)

fast = compiled(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

CHUNK = 512
SIGN, MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
LOWEST_ORDER = np.int32(-(2**31))
LARGEST = single(80.0)  # as in `divergences`
REVERSE, MIXTURE, VARIATION = 0, 1, 2


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
        kind: `REVERSE`, `MIXTURE` or `VARIATION`; forward KL has a kernel of its own.
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
def order(x):
    """An integer that is larger where a float is, and largest for NaN; an integer maximum vectorizes."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> SIGN) & MAGNITUDE))


@exact
def unorder(key):
    """The float of an `order`."""
    return np.int32(key ^ np.int32(np.int32(key >> SIGN) & MAGNITUDE)).view(np.float32)


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
    low, high = np.int32(2**31 - 1), LOWEST_ORDER
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


@fast
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


@fast
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


@exact
def mixture_slope(d, taught):
    """Derivative of a divergence from a mixture with respect to q, up to a constant.

    It is (1 - s) (b s - a (1 - s)) g / (1 + s g) - b log(1 + s g) with g = expm1(d), a and b the weights of both terms.
    For `jsd` the first part is zero.
    """
    share, grown = taught.share, growth(d)
    first = (ONE - share) * (taught.second * share - taught.first * (ONE - share))
    return first * grown / (ONE + share * grown) - taught.second * log_of_one_more(share * grown)


@exact
def kl_to_mixture(first, other, ratio, share):
    """A token's part of KL(first || m), m = (1 - share) first + share other; see `divergences._mixture`."""
    x = share * growth(ratio)
    far = share * (other - first) - first * log_of_one_more(x)
    return first * below_line(x) if ratio < ONE else far


@exact
def variation_slope(d):
    """Half the sign of q - p."""
    return single(-0.5) if d > ZERO else (single(0.5) if d < ZERO else ZERO * d)


@fast
def slope_of(d, taught):
    """Derivative of a divergence with respect to q, up to a constant."""
    if taught.kind == REVERSE:
        return -d
    if taught.kind == MIXTURE:
        return mixture_slope(min(max(d, -LARGEST), LARGEST), taught)
    return variation_slope(d)


@fast
def reverse_slopes(student, teacher, row, taught, at_top):
    """KL(q || p) = sum -q d + (p - q). Slopes less the top's go to `teacher`; returns value and mean of these."""
    inverse, value, mean = taught.inverse, 0.0, 0.0
    for start in range(0, student.size, CHUNK):
        part, share, mine, theirs = ZERO, ZERO, student[start:start + CHUNK], teacher[start:start + CHUNK]
        for index in range(mine.size):
            d = log_ratio(mine[index], theirs[index], inverse, row)
            p = exponential((theirs[index] - row.top_teacher) * inverse) * row.teacher
            q = exponential((mine[index] - row.top) * inverse) * row.student
            near = abs(d) < ONE
            part += q * beyond_line(d if near else ZERO) if near else -q * d - q_minus_p(p, q, d)
            slope = -d - at_top
            share += q * slope
            theirs[index] = slope
        value += part
        mean += share
    return value, mean


@fast
def mixture_slopes(student, teacher, row, taught, at_top):
    """A divergence from a mixture; as `reverse_slopes`."""
    inverse, value, mean = taught.inverse, 0.0, 0.0
    for start in range(0, student.size, CHUNK):
        part, share, mine, theirs = ZERO, ZERO, student[start:start + CHUNK], teacher[start:start + CHUNK]
        for index in range(mine.size):
            d = log_ratio(mine[index], theirs[index], inverse, row)
            d = d if d < LARGEST else (LARGEST if d == d else d)
            d = d if d > -LARGEST else (-LARGEST if d == d else d)
            p = exponential((theirs[index] - row.top_teacher) * inverse) * row.teacher
            q = exponential((mine[index] - row.top) * inverse) * row.student
            part += (taught.first * kl_to_mixture(p, q, -d, ONE - taught.share)
                     + taught.second * kl_to_mixture(q, p, d, taught.share))
            slope = mixture_slope(d, taught) - at_top
            share += q * slope
            theirs[index] = slope
        value += part
        mean += share
    return value, mean


@fast
def variation_slopes(student, teacher, row, taught, at_top):
    """1/2 sum |p - q|; as `reverse_slopes`."""
    inverse, value, mean = taught.inverse, 0.0, 0.0
    for start in range(0, student.size, CHUNK):
        part, share, mine, theirs = ZERO, ZERO, student[start:start + CHUNK], teacher[start:start + CHUNK]
        for index in range(mine.size):
            d = log_ratio(mine[index], theirs[index], inverse, row)
            p = exponential((theirs[index] - row.top_teacher) * inverse) * row.teacher
            q = exponential((mine[index] - row.top) * inverse) * row.student
            part += abs(q_minus_p(p, q, d))
            slope = variation_slope(d) - at_top
            share += q * slope
            theirs[index] = slope
        value += part
        mean += share
    return value * 0.5, mean


@fast
def position_of(row, top):
    """Where the largest logit is."""
    found = np.int32(2**31 - 1)
    for index in range(row.size):
        found = min(found, np.int32(index) if row[index] == top else np.int32(2**31 - 1))
    return min(found, np.int32(row.size - 1))  # NaN equals nothing


@fast
def slope_rows(logits, teachers, asked, targets, begin, end, text, taught, shape, values, gradient):
    """Rows with any other divergence, whose gradient is q (a - sum q a) with a its derivative with respect to q.

    `teachers` is overwritten. See `divergences._through_softmax` for why a is 0 at the most probable token.
    """
    inverse, factor = taught.inverse, single(taught.factor)
    for number in range(begin, end):
        student, teacher, target = logits[number], teachers[number], targets[number]
        if not asked[number]:
            text_row(student, target, text, shape, values[number], gradient)
            continue
        row = prepared(student, teacher, target, text, inverse, values[number])
        before, place = student[target], position_of(student, row.top)
        at_top = slope_of(log_ratio(student[place], teacher[place], inverse, row), taught)
        if taught.kind == REVERSE:
            value, mean = reverse_slopes(student, teacher, row, taught, at_top)
        elif taught.kind == MIXTURE:
            value, mean = mixture_slopes(student, teacher, row, taught, at_top)
        else:
            value, mean = variation_slopes(student, teacher, row, taught, at_top)
        values[number, 2] = value
        if not gradient:
            continue
        middle = single(mean)
        for index in range(student.size):
            logit = student[index]
            by = exponential((logit - row.top) * inverse) * row.student * (teacher[index] - middle) * factor
            by += exponential(logit - row.top) * row.one * row.slope - row.even
            student[index] = by * (ONE - (logit * shape.inverse_cap) ** 2) * shape.scale
        at_target(student, target, before, text, shape)

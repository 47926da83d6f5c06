"""Divergences other than forward KL for `row_kernels`: those whose gradient goes through a derivative by probability.

The gradient of sum f(p, q) with respect to the student's logits is q (a - sum q a), with a = df/dq. The first pass over
a row leaves a in the place of the teacher's logits, and its mean; the second makes the gradient of them.
"""

from __future__ import annotations

import numpy as np

from strategies.distillation.losses.row_kernels import (
    CHUNK,
    at_target,
    fast,
    kernel,
    log_ratio,
    prepared,
    q_minus_p,
    text_row,
)
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

LARGEST = single(80.0)  # as in `divergences`
REVERSE, MIXTURE, VARIATION = 0, 1, 2


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
def reverse_terms(p, q, d, taught):
    """Of a token, its part of KL(q || p) = sum -q d + (p - q), and the derivative with respect to q."""
    near = abs(d) < ONE
    return q * beyond_line(d if near else ZERO) if near else -q * d - q_minus_p(p, q, d), -d


@fast
def mixture_terms(p, q, d, taught):
    """The same of a divergence from a mixture."""
    d = d if d < LARGEST else (LARGEST if d == d else d)
    d = d if d > -LARGEST else (-LARGEST if d == d else d)
    return (taught.first * kl_to_mixture(p, q, -d, ONE - taught.share)
            + taught.second * kl_to_mixture(q, p, d, taught.share)), mixture_slope(d, taught)


@fast
def variation_terms(p, q, d, taught):
    """The same of |p - q|, of which the divergence is half the sum."""
    return abs(q_minus_p(p, q, d)), variation_slope(d)


def first_pass(terms):
    """Compile the loop over a row for a divergence's terms."""
    @fast
    def slopes(student, teacher, row, taught, at_top):
        inverse, value, mean = taught.inverse, 0.0, 0.0
        for start in range(0, student.size, CHUNK):
            part, share, mine, theirs = ZERO, ZERO, student[start:start + CHUNK], teacher[start:start + CHUNK]
            for index in range(mine.size):
                d = log_ratio(mine[index], theirs[index], inverse, row)
                p = exponential((theirs[index] - row.top_teacher) * inverse) * row.teacher
                q = exponential((mine[index] - row.top) * inverse) * row.student
                more, slope = terms(p, q, d, taught)
                part += more
                slope = slope - at_top
                share += q * slope
                theirs[index] = slope
            value += part
            mean += share
        return value, mean

    return slopes


# (value, mean of the slopes) of a row; slopes less the most probable token's are written to `teacher`.
reverse_slopes, mixture_slopes, variation_slopes = map(first_pass, (reverse_terms, mixture_terms, variation_terms))


@fast
def position_of(row, top):
    """Where the largest logit is."""
    found = np.int32(2**31 - 1)
    for index in range(row.size):
        found = min(found, np.int32(index) if row[index] == top else np.int32(2**31 - 1))
    return min(found, np.int32(row.size - 1))  # NaN equals nothing


@kernel
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
            value *= 0.5
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

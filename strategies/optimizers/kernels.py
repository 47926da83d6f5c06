"""Compiled passes over weights, gradients and moments on CPU, for steps that memory bandwidth decides.

Each pass reads what it needs once and keeps nothing: an update is computed once for its norm and once more to be
applied, which costs less than to write it and read it again. Numbers are rounded as IEEE 754 says, operation by
operation; sums of squares alone are reordered, in float64. So a step's bits depend neither on threads nor on where in a
tensor an element lies.

numba compiles a pass when it is first used and keeps the result on disk.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils

from strategies.common.compiled import compiled

Array = np.ndarray[Any, Any]

strict = compiled(error_model="numpy")
inlined = compiled(error_model="numpy", forceinline=True)
summing = compiled(error_model="numpy", fastmath={"reassoc"}, forceinline=True)
"""Sums may be taken in any order, so that they are vectorized; functions that are `inlined` there stay as they are."""


@numba.extending.intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """The address of a tensor's memory, as a pointer."""
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)
    return types.voidptr(address), code


@inlined
def _floats(address: Any, length: Any) -> Any:
    return numba.carray(_pointer(address), length, np.float32)


# ---- LAMB

@inlined
def _lerp(start: Any, end: Any, weight: Any, rest: Any) -> Any:
    """start + weight (end - start), from the nearer end; weight + rest = 1."""
    return start + (end - start) * weight if weight < 0.5 else end - (end - start) * rest


@inlined
def _lamb_update(weight: Any, mean: Any, square: Any, scale: Any, eps: Any, decay: Any) -> Any:
    return mean / (np.sqrt(square) * scale + eps) + decay * weight


@inlined
def _square(value: Any) -> Any:
    return np.float64(value) * np.float64(value)


@summing
def _lamb_advance(weight: Array, gradient: Array, mean: Array, square: Array, scalars: Array) -> tuple[float, float]:
    """Advance the moments; squared norms of weight and update."""
    scale, eps, decay = np.float32(scalars[0]), np.float32(scalars[1]), np.float32(scalars[2])
    keep1, keep2 = np.float32(scalars[3]), np.float32(scalars[4])
    new1, new2 = np.float32(1 - scalars[3]), np.float32(1 - scalars[4])
    weights, updates = 0.0, 0.0
    for i in range(len(weight)):
        mean[i] = _lerp(mean[i], gradient[i], new1, keep1)
        square[i] = _lerp(square[i], gradient[i] * gradient[i], new2, keep2)
        weights += _square(weight[i])
        updates += _square(_lamb_update(weight[i], mean[i], square[i], scale, eps, decay))
    return weights, updates


@inlined
def _lamb_apply(weight: Array, mean: Array, square: Array, scalars: Array, rate: float) -> None:
    scale, eps, decay = np.float32(scalars[0]), np.float32(scalars[1]), np.float32(scalars[2])
    factor = np.float32(rate)
    for i in range(len(weight)):
        weight[i] -= factor * _lamb_update(weight[i], mean[i], square[i], scale, eps, decay)


@inlined
def lamb_advance(table: Array, scalars: Array, norms: Array) -> None:
    """Advance the moments of k runs of elements, and find the norms of their weights and updates.

    Args:
        table: int64 [k, 5]: addresses of weight, gradient, first and second moment, all fp32, and number of elements.
        scalars: float64 [k, 7]: scale of the root of the second moment, eps and weight decay, where an update is
            mean / (scale sqrt(square) + eps) + decay weight; decay rates of the moments; learning rate and bound of the
            trust ratio, which is infinite for none.
        norms: float64 [k, 2]: receives squared norms of weight and update.
    """
    for k in range(len(table)):
        length = table[k, 4]
        norms[k, 0], norms[k, 1] = _lamb_advance(_floats(table[k, 0], length), _floats(table[k, 1], length),
                                                 _floats(table[k, 2], length), _floats(table[k, 3], length), scalars[k])


@inlined
def lamb_apply(table: Array, scalars: Array, rates: Array) -> None:
    """weight -= rate update, for `table` and `scalars` as in `lamb_advance` and float64 rates [k]."""
    for k in range(len(table)):
        length = table[k, 4]
        _lamb_apply(_floats(table[k, 0], length), _floats(table[k, 2], length), _floats(table[k, 3], length),
                    scalars[k], rates[k])


@strict
def lamb_step(table: Array, scalars: Array, ratios: Array) -> None:
    """Both, one run after another, each of which is a whole parameter; ratios: float64 [k], receives trust ratios."""
    norms = np.empty((1, 2))
    for k in range(len(table)):
        lamb_advance(table[k:k + 1], scalars[k:k + 1], norms)
        ratio = np.sqrt(norms[0, 0] / norms[0, 1]) if norms[0, 0] > 0 and norms[0, 1] > 0 else 1.0
        ratios[k] = scalars[k, 6] if ratio > scalars[k, 6] else ratio
        lamb_apply(table[k:k + 1], scalars[k:k + 1], ratios[k:k + 1] * scalars[k, 5])


# ---- Adafactor

@inlined
def _adafactor_update(gradient: Any, row: Any, column: Any, eps: Any) -> Any:
    return gradient / np.sqrt(max(row * column, eps))


@inlined
def _blend(kept: Array, sums: Array, count: int, fresh: float) -> None:
    """kept = (1 - fresh) kept + fresh sums / count, fp32 and float64 of one shape [n]."""
    weight, rest = np.float32(fresh), np.float32(1 - fresh)
    for i in range(len(kept)):
        kept[i] = _lerp(kept[i], np.float32(sums[i] / count), weight, rest)


@inlined
def _blend_squares(kept: Array, gradient: Array, fresh: float) -> None:
    weight, rest = np.float32(fresh), np.float32(1 - fresh)
    for i in range(len(kept)):
        kept[i] = _lerp(kept[i], gradient[i] * gradient[i], weight, rest)


@inlined
def row_shares(row: Array, share: Array, eps: float) -> None:
    """share = row / max(mean(row), eps) for each matrix, fp32 [L, R] both."""
    for matrix in range(row.shape[0]):
        total = 0.0
        for i in range(row.shape[1]):
            total += row[matrix, i]
        mean = np.float32(max(total / row.shape[1], eps))
        for i in range(row.shape[1]):
            share[matrix, i] = row[matrix, i] / mean


@summing
def add_squares(gradient: Array, row: Array, column: Array) -> None:
    """Add the squares of fp32 [L, R, C] over columns to `row` [L, R] and over rows to `column` [L, C], both float64."""
    for matrix in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            total = 0.0
            for j in range(gradient.shape[2]):
                square = _square(gradient[matrix, i, j])
                total += square
                column[matrix, j] += square
            row[matrix, i] += total


@summing
def adafactor_norms(weight: Array, gradient: Array, share: Array, column: Array, eps: float) -> tuple[float, float]:
    """Squared norms of weight and of gradient / sqrt(max(share column, eps^2)): fp32 [L, R, C], [L, R], [L, C]."""
    smallest = np.float32(eps * eps)
    weights, updates = 0.0, 0.0
    for matrix in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            row = share[matrix, i]
            for j in range(gradient.shape[2]):
                weights += _square(weight[matrix, i, j])
                updates += _square(_adafactor_update(gradient[matrix, i, j], row, column[matrix, j], smallest))
    return weights, updates


@inlined
def adafactor_apply(weight: Array, gradient: Array, share: Array, column: Array, eps: float, keep: float, rate: float
                    ) -> None:
    """weight = keep weight - rate gradient / sqrt(max(share column, eps^2)): fp32 [L, R, C], [L, R], [L, C]."""
    smallest, kept, factor = np.float32(eps * eps), np.float32(keep), np.float32(rate)
    for matrix in range(gradient.shape[0]):
        for i in range(gradient.shape[1]):
            row = share[matrix, i]
            for j in range(gradient.shape[2]):
                update = _adafactor_update(gradient[matrix, i, j], row, column[matrix, j], smallest)
                weight[matrix, i, j] = kept * weight[matrix, i, j] - factor * update


@strict
def adafactor_step(table: Array, scalars: Array) -> None:
    """Step k whole parameters, one after another.

    Args:
        table: int64 [k, 7]: addresses of weight, gradient, row and column means, and L, R, C. For a parameter that is
            no matrix (L = R = 1) the address of row means is 0, and the column means are its variance.
        scalars: float64 [k, 7]: weight of the new mean, rho, eps[0], eps[1], d, and what is kept of the weight.
    """
    for k in range(len(table)):
        stack, rows, columns = table[k, 4], table[k, 5], table[k, 6]
        fresh, rho, eps, floor, threshold, keep = (scalars[k, 0], scalars[k, 1], scalars[k, 2], scalars[k, 3],
                                                   scalars[k, 4], scalars[k, 5])
        weight = _floats(table[k, 0], stack * rows * columns).reshape(stack, rows, columns)
        gradient = _floats(table[k, 1], stack * rows * columns).reshape(stack, rows, columns)
        column = _floats(table[k, 3], stack * columns).reshape(stack, columns)
        share = np.ones((1, rows), np.float32)
        matrix = table[k, 2] != 0
        row = _floats(table[k, 2] if matrix else table[k, 0], stack * rows).reshape(stack, rows)
        if matrix:
            over_columns, over_rows = np.empty((1, rows)), np.empty((1, columns))
            for i in range(stack):
                over_columns[:] = 0.0
                over_rows[:] = 0.0
                add_squares(gradient[i:i + 1], over_columns, over_rows)
                _blend(row[i], over_columns[0], columns, fresh)
                _blend(column[i], over_rows[0], rows, fresh)
        else:
            _blend_squares(column[0], gradient[0, 0], fresh)
        weights, updates = 0.0, 0.0
        for i in range(stack):
            if matrix:
                row_shares(row[i:i + 1], share, eps)
            one, two = adafactor_norms(weight[i:i + 1], gradient[i:i + 1], share, column[i:i + 1], eps)
            weights += one
            updates += two
        count = max(1, stack * rows * columns)
        clip = max(1.0, np.sqrt(updates / count) / threshold)
        rate = max(np.sqrt(weights / count), floor) * rho / clip
        for i in range(stack):
            if matrix:
                row_shares(row[i:i + 1], share, eps)
            adafactor_apply(weight[i:i + 1], gradient[i:i + 1], share, column[i:i + 1], eps, keep, rate)


# ---- Adafactor, span by span of rectangles: tables are those of `adafactor_passes.Spans`

@strict
def adafactor_sums(table: Array, begins: Array, sums: Array) -> None:
    """Sums of squares of each span, over columns [L, R] and over rows [L, C], into zeros that begin at int64 [k, 2]."""
    for k in range(len(table)):
        stack, rows, columns = table[k, 4], table[k, 5], table[k, 6]
        gradient = _floats(table[k, 1], stack * rows * columns).reshape(stack, rows, columns)
        over_columns = sums[begins[k, 0]:begins[k, 0] + stack * rows].reshape(stack, rows)
        over_rows = sums[begins[k, 1]:begins[k, 1] + stack * columns].reshape(stack, columns)
        add_squares(gradient, over_columns, over_rows)


@strict
def adafactor_add_means(table: Array, begins: Array, sizes: Array, blocks: Array, sums: Array) -> None:
    """Add those sums over the whole matrices' columns and rows to the fp32 numbers that the table names.

    Args:
        sizes: int64 [k, 5]: L, R and C of a span, R and C of the whole matrix.
        blocks: int64 [k]: the same for the spans of one rectangle, whose columns are summed before they are rounded.
    """
    for k in range(len(table)):
        count, width = table[k, 4] * table[k, 5], table[k, 4] * table[k, 6]
        row, column = _floats(table[k, 2], count), _floats(table[k, 3], width)
        for i in range(count):
            row[i] = np.float32(row[i] + sums[begins[k, 0] + i] / sizes[k, 4])
        follows = k + 1 < len(table) and blocks[k + 1] == blocks[k] and table[k + 1, 3] == table[k, 3]
        for j in range(width):
            total = sums[begins[k, 1] + j]
            if follows:
                sums[begins[k + 1, 1] + j] += total
            else:
                column[j] = np.float32(column[j] + total / sizes[k, 3])


@strict
def row_shares_of(rows: Array, share: Array, eps: float) -> None:
    """`row_shares` of n row means, one after another: int64 [n, 3] of address, L and R; share: flat fp32 of all."""
    at = 0
    for k in range(len(rows)):
        stack, count = rows[k, 1], rows[k, 2]
        row_shares(_floats(rows[k, 0], stack * count).reshape(stack, count),
                   share[at:at + stack * count].reshape(stack, count), eps)
        at += stack * count


@inlined
def _of_span(row: Array) -> Any:
    stack, rows, columns = row[4], row[5], row[6]
    weight, gradient = _floats(row[0], stack * rows * columns), _floats(row[1], stack * rows * columns)
    share, column = _floats(row[2], stack * rows), _floats(row[3], stack * columns)
    return (weight.reshape(stack, rows, columns), gradient.reshape(stack, rows, columns), share.reshape(stack, rows),
            column.reshape(stack, columns))


@strict
def adafactor_norms_of(table: Array, eps: float, norms: Array) -> None:
    """`adafactor_norms` of each span, into float64 [k, 2]."""
    for k in range(len(table)):
        weight, gradient, share, column = _of_span(table[k])
        norms[k, 0], norms[k, 1] = adafactor_norms(weight, gradient, share, column, eps)


@strict
def adafactor_apply_to(table: Array, eps: float, keep: float, rates: Array) -> None:
    """`adafactor_apply` to each span; rates: float64 [k]."""
    for k in range(len(table)):
        weight, gradient, share, column = _of_span(table[k])
        adafactor_apply(weight, gradient, share, column, eps, keep, rates[k])

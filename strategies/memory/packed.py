"""The size in bytes of a quantized weight on disk."""

from __future__ import annotations

from typing import Any

SHAPE = 16  # bytes of a packed weight's shape, two int64


def packed_bytes(outputs: int, inputs: int, quantizer: Any, *, bits: int, packed: bool, scale_bytes: int,
                 static: bool, turned: bool = False, pieces: int = 1) -> int:
    """Bytes of a weight in the compressed-tensors format: integers, scales, zero points, and a static input scale.

    Args:
        outputs: rows of the weight.
        inputs: columns of the weight.
        quantizer: provides `group_size`, `per_tensor` and `symmetric`.
        bits: of an integer, as the format stores it.
        packed: whether integers are packed into 32-bit words along a row; else each takes a byte.
        scale_bytes: bytes of a scale.
        static: whether there is also a calibrated scale of the inputs.
        turned: whether the weight is stored transposed, (inputs, outputs).
        pieces: number of tensors that it is stored in, each with its shape.
    """
    groups = inputs // (quantizer.group_size or inputs)
    scales = 1 if quantizer.per_tensor else outputs * groups
    rows, columns = (inputs, outputs) if turned else (outputs, inputs)
    total = 4 * rows * _words(columns * bits) + pieces * SHAPE if packed else outputs * inputs
    if not quantizer.symmetric:
        total += 4 * groups * _words(outputs * bits) if packed and not quantizer.per_tensor else scales
    return total + scale_bytes * (scales + static)


def _words(bits: int) -> int:
    return -(-bits // 32)

"""Pack the integers and scales of a quantized layer into llama.cpp's block types, so that weights stay identical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

from strategies.export.quantized_layers import Quantized, Quantizer

Parts = tuple[numpy.ndarray, ...]


@dataclass(frozen=True)
class GgufBlock:
    """A GGUF block type: a block of bytes for a number of adjacent weights that share a scale.

    Attributes:
        name: llama.cpp's name.
        kind: of the quantized values, like a quantizer's `kind`.
        bits: per value.
        zero_point: whether the type has zero points.
        weights: number of weights in a block.
        bytes: size of a block.
        parts: maps values (blocks, weights) int16, scales (blocks, 2) uint8, and zero points (blocks, 1) uint8, offset
            so that the smallest value is 0, to the fields of blocks in order, each (blocks, bytes of the field) uint8.
    """

    name: str
    kind: str
    bits: int
    zero_point: bool
    weights: int
    bytes: int
    parts: Callable[[numpy.ndarray, numpy.ndarray, numpy.ndarray], Parts]

    def holds(self, quantizer: Quantizer, inputs: int) -> bool:
        """Whether the type represents every weight of such a quantizer exactly, for rows of `inputs` weights.

        The scale of a larger group is repeated. If the type has no zero points, q - zero_point is stored, which needs
        one more bit; symmetric values never get more bits than they were trained with.
        """
        if self.kind != quantizer.kind or (quantizer.group_size or inputs) % self.weights:
            return False
        own = quantizer.symmetric or self.zero_point
        return self.bits == quantizer.bits + (not own)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including the scale."""
        return 8 * self.bytes / self.weights


def block_for(layer: Quantized, name: str) -> GgufBlock:
    """The smallest type that represents a layer exactly.

    Raises:
        ValueError: there is none; the message lists the supported schemes.
    """
    quantizer, inputs = layer.quantizer, layer.weight.shape[-1]
    if layer.activations is not None:
        raise ValueError(f"{name} quantizes its activations, of which GGUF knows nothing: leave `activations` out")
    if layer.weight.ndim != 2:
        raise ValueError(f"{name} is a {type(layer).__name__}: GGUF has quantized linear layers and embeddings")
    if quantizer.scale_dtype is not torch.float16:
        raise ValueError(f"{name} has scales in {str(quantizer.scale_dtype).removeprefix('torch.')}, and GGUF has them "
                         "in float16: train with these, as `export.dtype: float16` does")
    found = [block for block in BLOCKS if block.holds(quantizer, inputs)]
    if not found:
        raise ValueError(f"{name}: GGUF has no type for {_scheme(quantizer)} over {inputs} inputs; it has {_offers()}")
    return min(found, key=lambda block: block.bits_per_weight)


def _scheme(quantizer: Quantizer) -> str:
    numbers = f"{quantizer.bits} bits" if quantizer.kind == "int" else f"{quantizer.kind} numbers"
    scale = f"groups of {quantizer.group_size}" if quantizer.group_size else (
        "one scale" if quantizer.per_tensor else "a scale for each output")
    return f"{numbers}, {'symmetric' if quantizer.symmetric else 'affine'}, in {scale}"


def _offers() -> str:
    return ("symmetric numbers of 4, 5 and 8 bits and affine ones of 3, 4 and 7 in groups of 32 (`group_size: 32`) or "
            "a multiple; in groups of 256 also 2 to 6 bits, affine 2, 4 and 5, and ternary ones")


@torch.no_grad()
def blocks_of(layer: Quantized, block: GgufBlock, name: str = "weight", rows: torch.Tensor | None = None
              ) -> numpy.ndarray:
    """A layer's weight (outputs, inputs) as (outputs, bytes of a row), uint8.

    Args:
        name: of the layer, for error messages.
        rows: (outputs,) order in which outputs are written; None for unchanged.

    Raises:
        ValueError: a scale of the layer is not exactly representable in float16.
    """
    grid, numbers = layer.grid(), layer.numbers()
    scale = grid.scale.to(torch.float16)
    if not torch.equal(scale.float(), grid.scale.float()):
        worst = float((scale.float() - grid.scale.float()).abs().max())
        raise ValueError(f"{name}: a scale that it was given is {worst:.3g} from the nearest float16, which GGUF has: "
                         "round scales before they are fixed, as `WeightQuantizer.stored` does")
    outputs, inputs = numbers.shape
    count = inputs // block.weights

    def of_blocks(values: torch.Tensor) -> torch.Tensor:
        """Repeat (outputs, groups) to (outputs, blocks of a row), in the order of `rows`."""
        values = values.expand(outputs, -1)
        values = values.repeat_interleave(count // values.shape[1], dim=1)
        return values if rows is None else values[rows]

    numbers = (numbers if rows is None else numbers[rows]).cpu().to(torch.int16).reshape(-1, block.weights)
    scale_bytes = of_blocks(scale).cpu().contiguous().numpy().reshape(-1, 1).view(numpy.uint8)
    zero = torch.zeros(outputs, count) if grid.zero_point is None else of_blocks(grid.zero_point)
    zero = zero.cpu().to(torch.int16).reshape(-1, 1)
    if not block.zero_point:
        numbers, zero = numbers - zero, torch.zeros_like(zero)
    parts = block.parts(numbers.numpy(), scale_bytes, (zero + 2 ** (block.bits - 1)).to(torch.uint8).numpy())
    found = numpy.concatenate(parts, axis=1)
    assert found.shape[1] == block.bytes, f"{block.name} has {block.bytes} bytes, not {found.shape[1]}"
    return found.reshape(outputs, -1)


# ---- layouts, as defined in ggml's `ggml-common.h`

def _packed(numbers: numpy.ndarray, bits: int, width: int) -> numpy.ndarray:
    """Pack values (blocks, weights) of a few bits into bytes (blocks, weights * bits / 8).

    `width` adjacent values go into as many bytes, and the next ones into higher bits of the same bytes until these are
    full.
    """
    fields = numbers.astype(numpy.uint8).reshape(len(numbers), -1, 8 // bits, width)
    shifts = numpy.arange(0, 8, bits, dtype=numpy.uint8).reshape(1, 1, -1, 1)
    return numpy.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(numbers), -1)


def _constant(like: numpy.ndarray, *values: int) -> numpy.ndarray:
    return numpy.tile(numpy.array(values, dtype=numpy.uint8), (len(like), 1))


def _ternary(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    return _packed(numbers + 1, 2, 32), scale


def _four(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    return scale, _packed(numbers + 8, 4, 16)


def _five(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    numbers = numbers + 16
    return scale, _packed(numbers >> 4, 1, 1), _packed(numbers & 15, 4, 16)


def _eight(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    return scale, numbers.astype(numpy.int8).view(numpy.uint8)


# Types of 256 weights have an integer factor on the scale for each 16 or 32 weights, which is 1 here.

def _two_of_256(numbers: numpy.ndarray, scale: numpy.ndarray, zero: numpy.ndarray) -> Parts:
    return (1 | zero << 4).repeat(16, 1), _packed(numbers + 2, 2, 32), scale, scale


def _three_of_256(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    numbers = numbers + 4
    ones = _constant(scale, *[0x11] * 8, *[0xAA] * 4)  # 33 sixteen times, low four bits first: readers subtract 32
    return _packed(numbers >> 2, 1, 32), _packed(numbers & 3, 2, 32), ones, scale


def _ones_and(zero: numpy.ndarray) -> numpy.ndarray:
    """Eight factors of 1 and eight zero points in 6 bits each (blocks, 12); the last four have two bits elsewhere."""
    return numpy.concatenate([_constant(zero, 1, 1, 1, 1), (zero | zero >> 4 << 6).repeat(4, 1),
                              (1 | zero << 4).repeat(4, 1)], axis=1)


def _four_of_256(numbers: numpy.ndarray, scale: numpy.ndarray, zero: numpy.ndarray) -> Parts:
    return scale, scale, _ones_and(zero), _packed(numbers + 8, 4, 32)


def _five_of_256(numbers: numpy.ndarray, scale: numpy.ndarray, zero: numpy.ndarray) -> Parts:
    numbers = numbers + 16
    return scale, scale, _ones_and(zero), _packed(numbers >> 4, 1, 32), _packed(numbers & 15, 4, 32)


def _six_of_256(numbers: numpy.ndarray, scale: numpy.ndarray, _: numpy.ndarray) -> Parts:
    numbers = numbers + 32
    return _packed(numbers & 15, 4, 64), _packed(numbers >> 4, 2, 32), _constant(scale, *[1] * 16), scale


BLOCKS = (
    GgufBlock("TQ2_0", "ternary", 2, False, 256, 66, _ternary),
    GgufBlock("Q2_K", "int", 2, True, 256, 84, _two_of_256),
    GgufBlock("Q3_K", "int", 3, False, 256, 110, _three_of_256),
    GgufBlock("Q4_0", "int", 4, False, 32, 18, _four),
    GgufBlock("Q4_K", "int", 4, True, 256, 144, _four_of_256),
    GgufBlock("Q5_0", "int", 5, False, 32, 22, _five),
    GgufBlock("Q5_K", "int", 5, True, 256, 176, _five_of_256),
    GgufBlock("Q6_K", "int", 6, False, 256, 210, _six_of_256),
    GgufBlock("Q8_0", "int", 8, False, 32, 34, _eight),
)

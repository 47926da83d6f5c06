"""Build the arithmetic of quantized layers in an ONNX graph, with packed integers and the scales of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import nn

from strategies.export.hf.transformers_folder import format_bits
from strategies.export.onnx.onnx_layers import DOMAIN
from strategies.export.quantized_layers import Quantized

BLOCKS = (16, 32, 64, 128, 256)  # group sizes that a product supports; with 2 bits, no larger ones
MICROSOFT = "com.microsoft"
OUTPUT = "/output"  # suffix of a layer's name for its output, by which readers find it
FP32, HALF = ir.DataType.FLOAT, {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def fill_in(model: ir.Model, layers: dict[str, Quantized]) -> None:
    """Replace the placeholder nodes that `onnx_layers` traced by the arithmetic of `layers`, by name.

    Initializers are computed lazily, one by one as they are written. Layers that share a weight share them.
    """
    graph, kept = model.graph, {}
    for node in [node for node in graph if node.domain == DOMAIN]:
        name = node.attributes["layer"].as_string()
        tape = ir.tape.Tape()
        weight = _Weight(graph, tape, name, layers[name], kept)
        found = getattr(weight, FILLS[node.op_type])(*node.inputs)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [found])
        if node.op_type == "Output" and not found.is_graph_output():
            found.name = name + OUTPUT
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MICROSOFT] = 1


FILLS = {"Product": "product", "IntegerProduct": "integer_product", "Rows": "rows", "Weight": "dequantized",
         "Output": "itself"}


def block_size(group_size: int | None, inputs: int) -> int:
    """Number of inputs that share a scale in a product: a group, or the largest of `BLOCKS` that divides a channel."""
    return group_size or max((block for block in BLOCKS if inputs % block == 0), default=BLOCKS[0])


class _Weight:
    """One quantized layer in a graph.

    Integers are stored as q + 2^(bits - 1), low bits first, in bytes (outputs, blocks, bytes of a block): the layout of
    `MatMulNBits`. A scale or zero point of a whole channel or tensor is stored once, and repeated over blocks by the
    graph, which a runtime does once, at load time.
    """

    def __init__(self, graph: ir.Graph, tape: ir.tape.Tape, name: str, layer: Quantized,
                 kept: dict[tuple[int, str], ir.Value]) -> None:
        self.graph, self.tape, self.name, self.layer, self.kept = graph, tape, name, layer, kept
        self.quantizer, self.bits = layer.quantizer, format_bits(layer.quantizer)
        self.outputs, self.inputs = layer.weight.shape[0], layer.weight[0].numel()
        self.block = block_size(self.quantizer.group_size, self.inputs)
        self.blocks = math.ceil(self.inputs / self.block)
        self.groups = self.inputs // (self.quantizer.group_size or self.inputs)
        self.scales = 1 if self.quantizer.per_tensor else self.outputs
        self.offset = 2 ** (self.bits - 1)
        self.scale_dtype = layer.grid().scale.dtype

    # ---- what stands in for a layer

    def itself(self, output: ir.Value) -> ir.Value:
        """The layer's output, which exists already."""
        return output

    def product(self, values: ir.Value) -> ir.Value:
        """Multiply (..., inputs) by the packed weight, in fp32."""
        inputs = [values, self.codes(), self._blockwise(self.scale(), self.blocks)]
        if not self.quantizer.symmetric:
            inputs.append(self._blockwise(self.zero_point(), math.ceil(self.blocks * self.bits / 8)))
        return self.tape.op("MatMulNBits", inputs, domain=MICROSOFT, attributes={
            "K": self.inputs, "N": self.outputs, "bits": self.bits, "block_size": self.block,
            "accuracy_level": 1})  # fp32; faster levels round activations to 8 bits, unlike training

    def integer_product(self, numbers: ir.Value) -> ir.Value:
        """Multiply 8-bit integers (..., inputs) by the 8-bit weight, and the result by the scale of each output.

        Both operands are unsigned: products of signed ones saturate on CPUs that accumulate them in 16 bits.
        """
        shifted = self.tape.op("Cast", [self.tape.op("Add", [numbers, self.constant(128.0)])],
                               {"to": ir.DataType.UINT8})
        middle = self.constant(128, ir.DataType.UINT8)
        zero = middle if self.quantizer.symmetric else self.tape.op(
            "Reshape", [self.zero_point(), self.constant([-1])])
        codes = self.tape.op("Transpose", [self._unpacked(self.codes(), self.blocks * self.block, self.inputs)],
                             {"perm": [1, 0]})
        sums = self.tape.op("MatMulInteger", [shifted, codes, middle, zero])
        scale = self.tape.op("Reshape", [self.scale(), self.constant([-1])])
        return self.tape.op("Mul", [self.tape.op("Cast", [sums], {"to": FP32}), scale])

    def rows(self, ids: ir.Value) -> ir.Value:
        """Look up and dequantize the rows (..., inputs) of `ids` (...)."""
        op, flat = self.tape.op, self.tape.op("Reshape", [ids, self.constant([-1])])
        codes, scale, zero = op("Gather", [self.codes(), flat]), self.scale(), self.zero_point()
        if not self.quantizer.per_tensor:
            scale, zero = op("Gather", [scale, flat]), zero and op("Gather", [zero, flat])
        found = self._dequantized(codes, scale, zero)
        shape = op("Concat", [op("Shape", [ids]), self.constant([self.inputs])], {"axis": 0})
        return op("Reshape", [found, shape])

    def dequantized(self) -> ir.Value:
        """The whole weight, dequantized."""
        kernels = self.layer.weight.ndim > 2
        if kernels and self.bits == 8 and self.groups == 1 and self.scale_dtype is torch.float32:
            return self._dequantized_by_runtime()
        found = self._dequantized(self.codes(), self.scale(), self.zero_point())
        return self.tape.op("Reshape", [found, self.constant(list(self.layer.weight.shape))])

    def _dequantized_by_runtime(self) -> ir.Value:
        """8-bit kernels with scales of channels, as int8 and a `DequantizeLinear`, which runtimes support well."""
        shape, of = list(self.layer.weight.shape), self.constant([] if self.quantizer.per_tensor else [-1])
        inputs = [self._initializer("weight", ir.DataType.INT8, shape, self.layer.numbers),
                  self.tape.op("Reshape", [self.scale(), of])]
        if not self.quantizer.symmetric:
            zero = self._initializer("weight_zero_point", ir.DataType.INT8, [self.scales, 1],
                                     lambda: self.layer.grid().zero_point.to(torch.int8))
            inputs.append(self.tape.op("Reshape", [zero, of]))
        return self.tape.op("DequantizeLinear", inputs, {"axis": 0})

    def _dequantized(self, codes: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
        """scale * (q - zero_point) (rows, groups, weights of a group), as `WeightQuantizer` multiplies.

        Args:
            codes: (rows, blocks, bytes of a block).
            scale: (rows or 1, groups).
            zero: (rows or 1, bytes), or None for symmetric numbers.
        """
        op = self.tape.op
        numbers = op("Reshape", [self._unpacked(codes, self.blocks * self.block, self.inputs),
                                 self.constant([-1, self.groups, self.inputs // self.groups])])
        each = self.constant([-1, self.groups, 1])
        if zero is None:
            zero = self.constant(float(self.offset))
        else:
            zero = op("Reshape", [self._unpacked(zero, self._zero_bytes() * 8 // self.bits, self.groups), each])
            zero = op("Cast", [zero], {"to": FP32})
        scale = op("Reshape", [op("Cast", [scale], {"to": FP32}), each])
        found = op("Mul", [op("Sub", [op("Cast", [numbers], {"to": FP32}), zero]), scale])
        if self.scale_dtype in HALF:  # the fp32 product of so few bits is exact, so it is rounded once
            found = op("Cast", [op("Cast", [found], {"to": HALF[self.scale_dtype]})], {"to": FP32})
        return found

    def _unpacked(self, packed: ir.Value, count: int, wanted: int) -> ir.Value:
        """Unpack `count` unsigned integers from each row of bytes (rows, ...) and keep the first: (rows, wanted)."""
        op, bits = self.tape.op, self.bits
        if bits < 8:
            # First the mask, so that the shift divides without a rest: OpenVINO 2026.4 rounds that to the nearest.
            shifts = range(0, 8, bits)
            masks = self.constant([(2**bits - 1) << shift for shift in shifts], ir.DataType.UINT8)
            packed = op("BitwiseAnd", [op("Unsqueeze", [packed, self.constant([-1])]), masks])
            packed = op("BitShift", [packed, self.constant(list(shifts), ir.DataType.UINT8)], {"direction": "RIGHT"})
        found = op("Reshape", [packed, self.constant([-1, count])])
        if wanted < count:
            found = op("Slice", [found, self.constant([0]), self.constant([wanted]), self.constant([1])])
        return found

    # ---- what is stored

    def codes(self) -> ir.Value:
        """Packed integers (outputs, blocks, bytes of a block)."""
        shape = [self.outputs, self.blocks, self.block * self.bits // 8]
        return self._initializer("weight_packed", ir.DataType.UINT8, shape,
                                 lambda: packed(self._unsigned(), self.bits, self.block).view(shape))

    def scale(self) -> ir.Value:
        """Scales (outputs or 1, groups), in the dtype that training rounds them to."""
        return self._initializer("weight_scale", HALF.get(self.scale_dtype, FP32), [self.scales, self.groups],
                                 lambda: self.layer.grid().scale.contiguous())

    def zero_point(self) -> ir.Value | None:
        """Zero points (outputs or 1, bytes), packed like the integers; that of a channel or tensor fills its byte."""
        if self.quantizer.symmetric:
            return None

        def compute() -> torch.Tensor:
            zero = (self.layer.grid().zero_point + self.offset).to(torch.uint8)
            zero = zero.expand(-1, 8 // self.bits) if self.groups == 1 else zero
            return packed(zero, self.bits, 8 // self.bits)

        return self._initializer("weight_zero_point", ir.DataType.UINT8, [self.scales, self._zero_bytes()], compute)

    def _zero_bytes(self) -> int:
        return math.ceil(self.groups * self.bits / 8)

    def _unsigned(self) -> torch.Tensor:
        """Integers (outputs, inputs), shifted to be unsigned."""
        return (self.layer.numbers().flatten(1).to(torch.int16) + self.offset).to(torch.uint8)

    def _initializer(self, part: str, dtype: ir.DataType, shape: list[int], compute: Callable[[], torch.Tensor]
                     ) -> ir.Value:
        return self._kept((id(self.layer.weight), part), f"{self.name}.{part}", lambda name: ir.LazyTensor(
            lambda: ir.tensor(compute().detach().cpu()), dtype, ir.Shape(shape), name=name))

    def constant(self, values: float | list[int], dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant tensor."""
        dtype = dtype or (FP32 if isinstance(values, float) else ir.DataType.INT64)
        return self._kept((dtype, str(values)), f"{DOMAIN}.{len(self.kept)}",
                          lambda name: ir.tensor(values, dtype=dtype, name=name))

    def _kept(self, key: tuple, name: str, make: Callable[[str], ir.TensorProtocol]) -> ir.Value:
        if key not in self.kept:
            tensor = make(name)
            self.kept[key] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
                                      const_value=tensor)
            self.graph.register_initializer(self.kept[key])
        return self.kept[key]

    def _blockwise(self, value: ir.Value, count: int) -> ir.Value:
        """(outputs or 1, groups) -> (outputs, count): repeat the values of a channel or tensor for each block."""
        if value.shape == (self.outputs, count):
            return value
        return self.tape.op("Expand", [value, self.constant([self.outputs, count])])


def packed(numbers: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Pack unsigned integers (rows, count) into bytes (rows, bytes), low bits first, zero-padded to whole blocks."""
    numbers = nn.functional.pad(numbers, (0, -numbers.shape[1] % block))
    numbers = numbers.unflatten(1, (-1, 8 // bits))
    return sum(numbers[..., place] << (bits * place) for place in range(8 // bits))


def store_as(model: ir.Model, dtype: torch.dtype) -> None:
    """Store unquantized tensors in half precision wherever that is lossless; products stay in fp32.

    Scales and zero points of quantized layers are not changed.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor.dtype != FP32 or isinstance(tensor, ir.LazyTensor) or tensor.size < 2:
            continue
        half = torch.from_numpy(tensor.numpy()).to(dtype)
        if not torch.equal(half.float(), torch.from_numpy(tensor.numpy())):
            continue
        stored = ir.Value(name=f"{value.name}.stored", shape=value.shape, type=ir.TensorType(HALF[dtype]),
                          const_value=ir.tensor(half, name=f"{value.name}.stored"))
        cast = ir.node("Cast", [stored], {"to": FP32})
        graph.register_initializer(stored)
        graph.initializers.pop(value.name)
        cast.outputs[0].name = value.name
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def name_axes(model: ir.Model, axes: Mapping[str, Sequence[str | None] | None]) -> None:
    """Name the axes of inputs and outputs, and drop the shapes between them, which go by the tracer's own names."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if axes[value.name] is not None and value.shape is not None:
            value.shape = ir.Shape([name or size for name, size in zip(axes[value.name], value.shape, strict=True)])
    outputs = set(model.graph.outputs)
    for value in (value for node in model.graph for value in node.outputs if value not in outputs):
        if value.shape is not None and not value.shape.is_static():
            value.shape = None

"""Neutral nodes -> the standard ONNX operators that onnxruntime runs on its integer kernels.

Measured rules of onnxruntime 1.31 on x86 that shape this file:
- activations uint8 (signed codes shifted by 128), weights int8 in [K, N] with an explicit zero point;
- a bias is added with Sum: Add would merge with a rank-2 MatMul into a Gemm that no integer kernel takes;
- a ReLU straight behind an integer MatMul blocks it, so a layer without bias gets a bias of zeros in front of one;
- per-token activations are uint8 with zero point 128 (the int8 form is 50 times slower);
- DequantizeLinear(W [K, N], block_size) -> MatMul becomes MatMulNBits, which knows blocks of 16 to 256;
- a weight that no kernel takes is written as Cast and Mul on constants: onnxruntime folds that once at load, while a
  DequantizeLinear would run at every inference.
"""

import numpy as np
import onnx_ir as ir

from exporter.lowering.lowered import LoweredLayer
from exporter.lowering.to_onnx import Array, Builder, Dialect, Node, packed_int4
from passes.ops import TINY_SCALE

BLOCKS = (256, 128, 64, 32, 16)
DEFAULT_BLOCK = 32
"""The block onnxruntime chooses for a weight-only layer with one scale per channel."""


def kernel_block(columns: int, group_size: int) -> int | None:
    """The block MatMulNBits uses for groups of `group_size` inputs of `columns`; None when it has none for them."""
    if group_size <= 0 or group_size >= columns:
        return DEFAULT_BLOCK
    return next((block for block in BLOCKS if group_size % block == 0), None)


class OnnxRuntimeDialect(Dialect):
    """Collects in `layers` how every quantized layer was stored."""

    def __init__(self) -> None:
        self.layers: list[LoweredLayer] = []

    def linear(self, b: Builder, node: Node) -> ir.Value:
        x = node.value(0)
        multiply = self._integer_matmul if node.integer("integer") else self._float_matmul
        y = multiply(b, node, x)
        bias = node.array(4)
        if bias is None and node.next_ops() & {"Relu", "Clip"}:
            bias = np.zeros(node.needed(1).shape[0], np.float32)
        return y if bias is None else b.op("Sum", y, b.constant("bias", bias))

    def _integer_matmul(self, b: Builder, node: Node, x: ir.Value | None) -> ir.Value:
        """Codes in an int8 container whatever their width: MatMulIntegerToFloat, or MatMulInteger per token."""
        codes, zero_point = as_int8(node.needed(1), node.array(3))
        scale = node.needed(2)[:, 0]
        per_tensor = scale.size == 1
        weight = b.constant("weight_codes", np.ascontiguousarray(codes.T))
        zero = b.constant("weight_zero_point", zero_point[0] if per_tensor else zero_point)
        self._record(node, "int8", codes.size, codes.nbytes + scale.nbytes + zero_point.nbytes, weight)
        token_bits = node.integer("token_bits")
        if not token_bits:
            scales = b.constant("weight_scale", scale[0] if per_tensor else scale)
            return b.op("MatMul", x, b.op("DequantizeLinear", weight, scales, zero, axis=1))
        row_scale, rows = self._quantize_rows(b, x, token_bits)
        middle = b.constant("row_zero_point", np.array(128, np.uint8))
        sums = b.op("Cast", b.op("MatMulInteger", rows, weight, middle, zero), to=ir.DataType.FLOAT.value)
        return b.op("Mul", b.op("Mul", sums, row_scale), b.constant("weight_scale", scale[0] if per_tensor else scale))

    def _quantize_rows(self, b: Builder, x: ir.Value | None, bits: int) -> tuple[ir.Value, ir.Value]:
        """Scale [..., 1] and uint8 codes (zero point 128) of each row."""
        axis = b.constant("last_axis", np.array([-1], np.int64))
        top = b.constant("row_top", np.array(2 ** (bits - 1) - 1, np.float32))
        largest = b.op("ReduceMax", b.op("Abs", x), axis, keepdims=1)
        # Max guards the rows that are all zeros.
        scale = b.op("Max", b.op("Div", largest, top), b.constant("tiny_scale", np.array(TINY_SCALE, np.float32)))
        shift = b.constant("row_shift", np.array(128, np.float32))
        codes = b.op("Add", b.op("Round", b.op("Div", x, scale)), shift)
        return scale, b.op("Cast", codes, to=ir.DataType.UINT8.value)

    def _float_matmul(self, b: Builder, node: Node, x: ir.Value | None) -> ir.Value:
        codes, scale, zero_point = node.needed(1), node.needed(2), node.array(3)
        block = kernel_block(codes.shape[1], node.integer("group_size"))
        if block is None:
            weight = self._folded(b, node, codes, scale, zero_point, node.integer("bits"), node.integer("group_size"))
            return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))
        stored, kind = container(b, "weight_codes", np.ascontiguousarray(codes.T), node.integer("bits"))
        attributes: dict[str, int] = {"axis": 1}
        if scale.shape[1] > 1:
            repeat = node.integer("group_size") // block
            attributes = {"axis": 0, "block_size": block}
            columns = -(-codes.shape[1] // block)
            scale = np.repeat(scale, repeat, axis=1)[:, :columns].T
            zero_point = None if zero_point is None else np.repeat(zero_point, repeat, axis=1)[:, :columns].T
        else:  # one scale for the tensor is written once a channel: no kernel takes a scalar
            rows = codes.shape[0]
            scale = np.broadcast_to(scale[:, 0], rows)
            zero_point = None if zero_point is None else np.broadcast_to(zero_point[:, 0], rows)
        inputs = [stored, b.constant("weight_scale", np.ascontiguousarray(scale))]
        written = stored.const_value.nbytes + scale.nbytes if stored.const_value is not None else 0
        if zero_point is not None:
            zero = zero_container(b, np.ascontiguousarray(zero_point), node.integer("bits"))
            written += zero.const_value.nbytes if zero.const_value is not None else 0
            inputs.append(zero)
        self._record(node, kind, codes.size, written, stored)
        return b.op("MatMul", x, b.op("DequantizeLinear", *inputs, **attributes))

    def conv_weight(self, b: Builder, node: Node) -> ir.Value:
        codes, zero_point = as_int8(node.needed(0), node.array(2), node.needed(1).size)
        scale = node.needed(1)
        per_tensor = scale.size == 1
        weight = b.constant("weight_codes", codes)
        self._record(node, "int8", codes.size, codes.nbytes + scale.nbytes + zero_point.nbytes, weight)
        return b.op(
            "DequantizeLinear",
            weight,
            b.constant("weight_scale", scale[0] if per_tensor else scale),
            b.constant("weight_zero_point", zero_point[0] if per_tensor else zero_point),
            axis=node.integer("axis"),
        )

    def dequantize(self, b: Builder, node: Node) -> ir.Value:
        codes, scale = node.needed(0), node.needed(1)
        return self._folded(b, node, codes, scale, node.array(2), node.integer("bits"), node.integer("group_size"))

    def _folded(
        self, b: Builder, node: Node, codes: Array, scale: Array, zero_point: Array | None, bits: int, group_size: int
    ) -> ir.Value:
        """(Cast(codes) - z) * s on constants, in groups when there are several: [out, in]."""
        rows, columns = codes.shape
        groups = scale.shape[1]
        stored, kind = container(b, "weight_codes", codes, bits)
        value = b.op("Cast", stored, to=ir.DataType.FLOAT.value)
        scale, written = scale.astype(np.float32), scale.nbytes
        if groups > 1:
            index = np.arange(columns) // group_size
            if columns % group_size:  # a short last group: one scale for each column
                scale, zero_point = scale[:, index], None if zero_point is None else zero_point[:, index]
            else:
                shape = b.constant("group_shape", np.array([rows, groups, group_size], np.int64))
                value = b.op("Reshape", value, shape)
                scale, zero_point = scale[:, :, None], None if zero_point is None else zero_point[:, :, None]
        if zero_point is not None:
            value = b.op("Sub", value, b.constant("weight_zero_point", zero_point.astype(np.float32)))
        value = b.op("Mul", value, b.constant("weight_scale", scale))
        if groups > 1 and not columns % group_size:
            value = b.op("Reshape", value, b.constant("matrix_shape", np.array([rows, columns], np.int64)))
        total = written + (stored.const_value.nbytes if stored.const_value is not None else 0)
        self._record(node, f"{kind} folded at load", codes.size, total, stored, name=b.scope)
        return value

    def embedding(self, b: Builder, node: Node) -> ir.Value:
        """Gather packed rows, then dequantize them: the table is never float."""
        codes, scale, zero_point, bits = node.needed(0), node.needed(1), node.array(2), node.integer("bits")
        indices = node.value(3)
        signed = codes.dtype == np.int8
        if bits > 4:
            stored = b.constant("weight_codes", codes)
            rows = b.op("Cast", b.op("Gather", stored, indices), to=ir.DataType.FLOAT.value)
        else:
            stored = b.constant("weight_codes", two_in_a_byte(codes, 8 if signed else 0))
            rows = self._unpack_rows(b, b.op("Gather", stored, indices), codes.shape[1])
            if signed:
                rows = b.op("Sub", rows, b.constant("weight_offset", np.array(8, np.float32)))
        written = scale.nbytes + (stored.const_value.nbytes if stored.const_value is not None else 0)
        if zero_point is not None:
            rows = b.op("Sub", rows, self._gathered(b, "weight_zero_point", zero_point.astype(np.float32), indices))
            written += zero_point.nbytes
        self._record(node, "int8 rows" if bits > 4 else "int4 rows", codes.size, written, stored)
        return b.op("Mul", rows, self._gathered(b, "weight_scale", scale, indices))

    def _gathered(self, b: Builder, name: str, values: Array, indices: ir.Value | None) -> ir.Value:
        constant = b.constant(name, values if values.shape[0] > 1 else values[0])
        return b.op("Gather", constant, indices) if values.shape[0] > 1 else constant

    def _unpack_rows(self, b: Builder, packed: ir.Value, columns: int) -> ir.Value:
        """Bytes [..., ceil(d / 2)] -> float codes [..., d]: low nibbles hold the first half of a row."""
        low = b.op("BitwiseAnd", packed, b.constant("low_nibble", np.array(15, np.uint8)))
        high = b.op("BitShift", packed, b.constant("nibble_bits", np.array(4, np.uint8)), direction="RIGHT")
        both = b.op("Cast", b.op("Concat", low, high, axis=-1), to=ir.DataType.FLOAT.value)
        if columns % 2 == 0:
            return both
        ends = [b.constant(name, np.array([value], np.int64)) for name, value in (("start", 0), ("end", columns))]
        return b.op("Slice", both, *ends, b.constant("last", np.array([-1], np.int64)))

    def fake_quantize(self, b: Builder, node: Node) -> ir.Value:
        low, high = node.integer("quant_min"), node.integer("quant_max")
        scale, zero_point = node.needed(1), int(node.needed(2))
        x = node.value(0)
        if high - low < 255:
            # Narrow codes ride in 8 bits: clamp to their range first. Max and Min, because a Clip would block fusion.
            bounds = [np.float32((code - zero_point) * scale) for code in (low, high)]
            x = b.op("Max", x, b.constant("low", np.array(bounds[0], np.float32)))
            x = b.op("Min", x, b.constant("high", np.array(bounds[1], np.float32)))
        shift = 128 if low < 0 else 0
        scales = b.constant("scale", scale.astype(np.float32))
        zero = b.constant("zero_point", np.array(zero_point + shift, np.uint8))
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scales, zero), scales, zero)

    def fake_quantize_dynamic(self, b: Builder, node: Node) -> ir.Value:
        assert node.integer("group_size") <= 0, "block-wise activations are what a kernel does, never a node of a file"
        scale, codes = self._quantize_rows(b, node.value(0), node.integer("bits"))
        shift = b.constant("row_shift", np.array(128, np.float32))
        return b.op("Mul", b.op("Sub", b.op("Cast", codes, to=ir.DataType.FLOAT.value), shift), scale)

    def _record(
        self, node: Node, kind: str, weights: int, written: int, stored: ir.Value, *, name: str | None = None
    ) -> None:
        layer = name if name is not None else node.string("name")
        self.layers.append(LoweredLayer(layer, kind, 8 * written / weights, str(stored.name)))


def as_int8(codes: Array, zero_point: Array | None, channels: int | None = None) -> tuple[Array, Array]:
    """Codes and zero points [channels] as int8: unsigned codes are shifted by 128, which changes no value."""
    if codes.dtype == np.uint8:
        assert zero_point is not None
        return (codes.astype(np.int16) - 128).astype(np.int8), (zero_point.reshape(-1) - 128).astype(np.int8)
    count = channels if channels is not None else codes.shape[0]
    zeros = np.zeros(count, np.int8) if zero_point is None else zero_point.reshape(-1).astype(np.int8)
    return codes, zeros


def container(b: Builder, name: str, codes: Array, bits: int) -> tuple[ir.Value, str]:
    """The initializer that holds `codes`: int4 or uint4 up to 4 bits, else int8 or uint8; and its name."""
    signed = codes.dtype == np.int8
    if bits > 4:
        return b.constant(name, codes), str(codes.dtype)
    return b.constant(name, packed_int4(codes, name, signed=signed)), "int4" if signed else "uint4"


def zero_container(b: Builder, zero_point: Array, bits: int) -> ir.Value:
    """Zero points in the type of their codes."""
    values = zero_point.astype(np.uint8)
    return b.constant("weight_zero_point", packed_int4(values, "", signed=False) if bits <= 4 else values)


def two_in_a_byte(codes: Array, offset: int) -> Array:
    """Codes [rows, d] + offset as uint8 [rows, ceil(d / 2)]: first half of a row in the low nibbles."""
    shifted = (codes.astype(np.int16) + offset).astype(np.uint8)
    half = -(-shifted.shape[1] // 2)
    low, high = shifted[:, :half], np.zeros((shifted.shape[0], half), np.uint8)
    high[:, : shifted.shape[1] - half] = shifted[:, half:]
    return low | (high << 4)

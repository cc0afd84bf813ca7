"""Neutral nodes -> the QuantizeLinear and DequantizeLinear forms that TensorRT keeps compressed and runs on integers.

Activations are symmetric: x' = clamp(round(x / s), lo, hi) s. A weight (q - z) s is what TensorRT knows, codes with no
zero point, and one number for each block of inputs and output (m is the middle of q's range):

    y = x ((q - z) s)^T = x ((q - m) s)^T + blocksum(x) ((m - z) s)^T

Codes of fewer than 4 bits with zero points, groups along the outputs and codebooks have no fused form; `packed.py` has
theirs. Measured on TensorRT-RTX 1.7 (which shares
parser and graph compiler with TensorRT 11), these forms shape this file:
- int8 and 8-bit floats (sm89 and later) are the types of activations; QuantizeLinear and its DequantizeLinear carry a
  zero point of 0 of that type; what multiplies them is of the same type;
- DequantizeLinear(W [K, N] int8, axis 1) -> MatMul is an int8 gemm behind quantized activations, and one fused
  weight-only kernel without them; what stands between the two (a Cast, an Add) would break the fusion;
- DequantizeLinear(W [K, N] int4, axis 0, block_size) -> MatMul is one fused kernel; with one scale per channel it is
  two, and the float weight exists in scratch memory. So per-channel int4 is written in blocks that repeat its scale;
- blocks must divide K; a tensor of int4 must have an even number of elements;
- DequantizeLinear(table, axis 0) -> Gather is one fused kernel: the table is never float;
- a matmul whose result is cut into pieces (q, k and v of an attention) becomes a float one of a float weight in pieces,
  unless an operator that moves no values stands before the cut: a Max with the lowest number, which changes nothing;
- a packed matrix in front of a MatMul is float in scratch memory; multiplied elementwise with a row and added up it is
  part of one kernel that needs none, and is decoded again for each row: the form for few rows;
- DequantizeLinear in front of a float convolution runs as a kernel of its own at every inference: the weight is packed
  in the engine and float in scratch memory.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporter.backends.tensorrt import packed
from exporter.lowering.lowered import LoweredLayer
from exporter.lowering.to_onnx import Array, Builder, Dialect, Node, numpy_of, packed_int4
from passes.ops import E4M3_MAX
from passes.weights import AffineWeight, CodebookWeight

CHANNEL_BLOCKS = (128, 64, 32, 16)
"""Blocks tried, in order, for an int4 weight with one scale per channel."""

FEW_ROWS = 4
"""Rows up to which decoding a weight for each moves less memory than writing it out in 16 bits and reading that again:
0.4 bytes or less a weight and row against 4."""

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT4 = 4
"""Bits of the narrowest type that TensorRT multiplies."""

MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
CUTS = frozenset({"Split", "Slice"})

SMALLEST_SPLIT = 16
"""Groups that do not divide a row are split into smaller ones of one scale down to this width, else the row is padded:
below it the repeated scales would outweigh the codes."""


DECODED = "decoded at every run"
"""Behind the format of a layer whose float matrix is made of the codes, and its scales of theirs, while it runs."""


class TensorRTDialect(Dialect):
    """Collects in `layers` how every quantized layer was stored.

    Symmetric weights of 2 and 3 bits in the layers of `compact` take as many in the file, those of others 4. `largest`
    {label: size} are the largest free axes that the engine is for.
    """

    def __init__(
        self, compact: frozenset[str] = frozenset(), largest: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.compact, self.largest = compact, largest
        self.layers: list[LoweredLayer] = []

    def linear(self, b: Builder, node: Node) -> ir.Value:
        weight, x = node.weight, node.value(0)
        assert x is not None
        integer = bool(node.integer("integer"))
        if isinstance(weight, AffineWeight) and has_fused_form(weight, integer=integer, compact=self._is_compact(node)):
            y = self._fused_matmul(b, node, weight, x)
        elif rows_of(x, self.largest) <= FEW_ROWS:
            y = multiply_and_add(b, x, self._packed_matrix(b, node), kind_of(node))
        else:
            y = b.op("MatMul", x, b.op("Transpose", self._packed_matrix(b, node), perm=[1, 0]))
        bias = node.array(2)
        if bias is not None:
            y = b.op("Add", y, b.constant("bias", bias))
        if node.next_ops(MOVES) & CUTS:
            kind = kind_of(node)
            lowest = ml_dtypes.finfo(kind).min  # type: ignore[no-untyped-call]  # as numpy's, and knows bfloat16
            y = b.op("Max", y, b.constant("lowest", np.array(lowest, kind)))
        return y

    def _fused_matmul(self, b: Builder, node: Node, weight: AffineWeight, x: ir.Value) -> ir.Value:
        """DequantizeLinear -> MatMul; of a weight with zero points a product of block sums beside it."""
        # For an int8 gemm codes ride in int8 whatever their width.
        bits = 8 if node.integer("integer") else weight.bits
        codes, middle = signed_codes(weight)
        scale, group_size = numpy_of(weight.scale), group_size_of(weight)
        rest = None
        if weight.zero_point is not None:
            rest = numpy_of((middle - weight.zero_point) * weight.scale).T
        if group_size < 0 and is_int4(codes, bits):
            scale, group_size = repeat_channel_scale(scale, weight.shape[1])
        matrix, kind = matrix_of(b, codes, scale.astype(kind_of(node)), bits, group_size, inputs_axis=0)
        y = b.op("MatMul", x, matrix)
        if rest is not None:
            y = add_block_sums(b, x, y, rest, weight.shape, kind_of(node))
            kind = f"{kind} and a product of block sums"
        self._record(b, node, kind)
        return y

    def _packed_matrix(self, b: Builder, node: Node) -> ir.Value:
        """The float matrix [out, in] of any weight, made at every run by kernels of its own."""
        weight = node.weight
        if isinstance(weight, CodebookWeight):
            matrix, kind = packed.codebook_matrix(b, weight, kind_of(node)), "aq_codebook"
        else:
            matrix, kind = packed.affine_matrix(b, weight, kind_of(node)), f"int{weight.bits}"
        self._record(b, node, f"{kind} {DECODED}")
        return matrix

    def conv_weight(self, b: Builder, node: Node) -> ir.Value:
        shape, weight = node.out.shape, node.weight
        assert shape is not None
        assert isinstance(weight, AffineWeight), "a convolution on integers has one grid a channel"
        if weight.zero_point is not None:  # it runs in float
            return packed.reshaped(b, self._packed_matrix(b, node), list(shape.numpy()))
        scale = numpy_of(weight.scale).astype(kind_of(node))
        codes = b.constant("weight_codes", numpy_of(weight.codes).reshape(shape.numpy()))
        scales = b.constant("weight_scale", scale.reshape(-1) if scale.size > 1 else scale[0, 0])
        self._record(b, node, "fp8" if weight.is_float8 else "int8")
        return b.op("DequantizeLinear", codes, scales, axis=0)

    def matrix(self, b: Builder, node: Node) -> ir.Value:
        return self._native_matrix(b, node)

    def _native_matrix(self, b: Builder, node: Node) -> ir.Value:
        weight = node.weight
        if not isinstance(weight, AffineWeight) or weight.zero_point is not None or weight.axis != 1:
            return self._packed_matrix(b, node)
        if self._is_compact(node) and weight.bits < INT4:
            return self._packed_matrix(b, node)
        codes, group_size = numpy_of(weight.codes), group_size_of(weight)
        scale = numpy_of(weight.scale).astype(kind_of(node))
        matrix, kind = matrix_of(b, codes, scale, weight.bits, group_size, inputs_axis=1)
        self._record(b, node, kind)
        return matrix

    def embedding(self, b: Builder, node: Node) -> ir.Value:
        return b.op("Gather", self._native_matrix(b, node), node.value(1), axis=0)

    def fake_quantize(self, b: Builder, node: Node) -> ir.Value:
        low, high, x = node.integer("quant_min"), node.integer("quant_max"), node.value(0)
        assert x is not None
        kind = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
        scale = node.needed(1).astype(kind)
        if high == E4M3_MAX:
            scales, none = b.constant("scale", scale), b.constant("zero_point", np.array(0, FLOAT8))
            return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scales, none), scales, none)
        if (low, high) != (-128, 127):  # narrower codes ride in int8: clamp to their range first
            x = b.op("Max", x, b.constant("low", (low * scale).astype(kind)))
            x = b.op("Min", x, b.constant("high", (high * scale).astype(kind)))
        scales, zero = b.constant("scale", scale), b.constant("zero_point", np.array(0, np.int8))
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scales, zero), scales, zero)

    def fake_quantize_dynamic(self, b: Builder, node: Node) -> ir.Value:
        raise NotImplementedError("TensorRT has no per-token activations; the backend refuses them before")

    def _is_compact(self, node: Node) -> bool:
        return node.name in self.compact

    def _record(self, b: Builder, node: Node, kind: str) -> None:
        """What the layer's weight takes: all constants written for it so far but a bias."""
        codes = next(value for value in b.constants if f".{packed.CODES}" in str(value.name))
        bias = next((value.const_value for value in b.constants if value.name == f"{b.scope}.bias"), None)
        bits = 8 * (b.bytes - (bias.nbytes if bias is not None else 0)) / math.prod(node.weight.shape)
        self.layers.append(LoweredLayer(node.name, kind, bits, str(codes.name)))


def matrix_of(
    b: Builder, codes: Array, scale: Array, bits: int, group_size: int, inputs_axis: int
) -> tuple[ir.Value, str]:
    """The float matrix of signed codes [out, in] and scale [out or 1, groups], its inputs along `inputs_axis`.

    And how it is stored.
    """
    columns = codes.shape[1]
    stored, scale, block = fit_blocks(codes, scale, group_size)
    kind, weight = container(b, stored if inputs_axis else stored.T, bits)
    if block:
        scale = np.broadcast_to(scale, (codes.shape[0], scale.shape[1]))
        scales = b.constant("weight_scale", np.ascontiguousarray(scale if inputs_axis else scale.T))
        value = b.op("DequantizeLinear", weight, scales, axis=inputs_axis, block_size=block)
    else:
        scale = scale[:, 0] if scale.size > 1 else scale[0, 0]
        value = b.op("DequantizeLinear", weight, b.constant("weight_scale", scale), axis=1 - inputs_axis)
    value = value if stored.shape[1] == columns else packed.cut(b, value, columns, inputs_axis)
    return value, f"{kind} blocks of {block}" if block else kind


def rows_of(x: ir.Value, largest: Mapping[str, int]) -> float:
    """The most rows that x [..., columns] may have, free axes as large as `largest` says; infinity if it does not."""
    rows = 1.0
    for size in list(x.shape or [None, None])[:-1]:
        rows *= size if isinstance(size, int) else largest.get(str(getattr(size, "value", None)), math.inf)
    return rows


def multiply_and_add(b: Builder, x: ir.Value, matrix: ir.Value, kind: packed.Kind) -> ir.Value:
    """x [..., columns] times matrix [out, columns], without a MatMul: one kernel decodes, multiplies and adds up."""
    if kind != np.float32:
        x, matrix = (b.op("Cast", value, to=ir.DataType.FLOAT.value) for value in (x, matrix))
    products = b.op("Mul", b.op("Unsqueeze", x, b.constant("each_output", np.array([-2], np.int64))), matrix)
    y = b.op("ReduceSum", products, b.constant("columns", np.array([-1], np.int64)), keepdims=0)
    return y if kind == np.float32 else b.op("Cast", y, to=ir.DataType.from_numpy(kind).value)


def add_block_sums(
    b: Builder, x: ir.Value, y: ir.Value, rest: Array, shape: tuple[int, int], kind: packed.Kind
) -> ir.Value:
    """y + sum of x over each of the blocks that divide its rows, times rest [blocks, out or 1]; shape is [out, in].

    In float32: sums of a block may pass float16's range.
    """
    outs, columns = shape
    assert x.shape is not None
    wide = [b.op("Cast", value, to=ir.DataType.FLOAT.value) if kind != np.float32 else value for value in (x, y)]
    sums = wide[0]
    blocks = len(rest)
    if blocks > 1:
        sums = packed.reshaped(b, sums, [0] * (len(x.shape) - 1) + [blocks, columns // blocks])
    sums = b.op("ReduceSum", sums, b.constant("block_axis", np.array([-1], np.int64)), keepdims=int(blocks == 1))
    factors = np.ascontiguousarray(np.broadcast_to(rest, (blocks, outs)), np.float32)
    total = b.op("Add", wide[1], b.op("MatMul", sums, b.constant("block_rest", factors)))
    return total if kind == np.float32 else b.op("Cast", total, to=ir.DataType.from_numpy(kind).value)


def has_fused_form(weight: AffineWeight, *, integer: bool, compact: bool = False) -> bool:
    """True when a matmul takes the codes as int4 or int8 behind a DequantizeLinear.

    Without zero points codes of any width ride in int4: larger than they need, but fused with the matmul. With them,
    or `compact`, codes of up to 3 bits are decoded by kernels of their own.
    """
    if weight.axis != 1:
        return False
    if integer and (weight.zero_point is None or weight.scale.shape[1] == 1):
        return True
    if weight.zero_point is None:
        return weight.bits >= INT4 or not compact
    return weight.bits >= INT4 and has_whole_groups(weight)


def has_whole_groups(weight: AffineWeight) -> bool:
    """True when no row ends in a shorter group."""
    return weight.scale.shape[1] == 1 or weight.shape[1] % weight.group_size == 0


def signed_codes(weight: AffineWeight) -> tuple[Array, int]:
    """The codes as int8 (or the 8-bit floats that they are), and what was taken off."""
    codes = numpy_of(weight.codes)
    if weight.is_float8:
        return codes, 0
    middle = 0 if weight.zero_point is None else 2 ** (weight.bits - 1)
    return (codes.astype(np.int16) - middle).astype(np.int8), middle


def kind_of(node: Node) -> packed.Kind:
    """The type of the layer's values."""
    return np.dtype(np.float32) if node.out.dtype is None else node.out.dtype.numpy()


def group_size_of(weight: AffineWeight) -> int:
    """Its group_size; -1 when a row has only one scale [out or 1, 1]."""
    return weight.group_size if weight.scale.shape[1] > 1 else -1


def fit_blocks(codes: Array, scale: Array, group_size: int) -> tuple[Array, Array, int]:
    """Codes [out, in], scale [out or 1, blocks] and the block that divides a row; block 0 for group_size -1.

    Groups that do not divide a row are split, or the row is padded with zeros to whole groups.
    """
    columns, groups = codes.shape[1], scale.shape[1]
    if group_size < 0:
        return codes, scale, 0
    if columns % group_size == 0:
        return codes, scale, group_size
    block = math.gcd(group_size, columns)
    if block >= SMALLEST_SPLIT:
        return codes, np.repeat(scale, group_size // block, axis=1)[:, : columns // block], block
    return np.pad(codes, ((0, 0), (0, groups * group_size - columns))), scale, group_size


def repeat_channel_scale(scale: Array, columns: int) -> tuple[Array, int]:
    """Scale [out or 1, 1] once for each block of a row, and the block; (scale, -1) when no block fits.

    At least two blocks: a block as wide as the row is per channel again, and not fused.
    """
    block = next((block for block in CHANNEL_BLOCKS if block < columns and columns % block == 0), -1)
    return (np.repeat(scale, columns // block, axis=1), block) if block > 0 else (scale, -1)


def is_int4(codes: Array | Tensor, bits: int) -> bool:
    """True when codes of this width go into an int4 tensor."""
    return bits <= 4 and math.prod(codes.shape) % 2 == 0


def container(b: Builder, codes: Array, bits: int) -> tuple[str, ir.Value]:
    """The name of the type that holds the codes, and the initializer."""
    codes = np.ascontiguousarray(codes)
    if codes.dtype == FLOAT8:
        return "fp8", b.constant("weight_codes", codes)
    if is_int4(codes, bits):
        return "int4", b.constant("weight_codes", packed_int4(codes, "weight_codes", signed=True))
    return "int8", b.constant("weight_codes", codes)

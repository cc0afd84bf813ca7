"""Neutral nodes -> the QuantizeLinear and DequantizeLinear forms that TensorRT keeps compressed and runs on integers.

All grids are symmetric: W = codes s, x' = clamp(round(x / s), lo, hi) s. Measured on TensorRT-RTX 1.7 (which shares
parser and graph compiler with TensorRT 11), these forms shape this file:
- int8 is the only type of activations; QuantizeLinear and its DequantizeLinear carry an int8 zero point of 0;
- DequantizeLinear(W [K, N] int8, axis 1) -> MatMul is an int8 gemm behind quantized activations, and one fused
  weight-only kernel without them; what stands between the two (a Cast, an Add) would break the fusion;
- DequantizeLinear(W [K, N] int4, axis 0, block_size) -> MatMul is one fused kernel; with one scale per channel it is
  two, and the float weight exists in scratch memory. So per-channel int4 is written in blocks that repeat its scale;
- blocks must divide K; a tensor of int4 must have an even number of elements;
- DequantizeLinear(table, axis 0) -> Gather is one fused kernel: the table is never float;
- a matmul whose result is cut into pieces (q, k and v of an attention) becomes a float one of a float weight in pieces,
  unless an operator that moves no values stands before the cut: a Max with the lowest number, which changes nothing;
- DequantizeLinear in front of a float convolution runs as a kernel of its own at every inference: the weight is packed
  in the engine and float in scratch memory.
"""

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporter.lowering.lowered import LoweredLayer
from exporter.lowering.to_onnx import Array, Builder, Dialect, Node, numpy_of, packed_int4
from passes.weights import AffineWeight

CHANNEL_BLOCKS = (128, 64, 32, 16)
"""Blocks tried, in order, for an int4 weight with one scale per channel."""

MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
CUTS = frozenset({"Split", "Slice"})

SMALLEST_SPLIT = 16
"""Groups that do not divide a row are split into smaller ones of one scale down to this width, else the row is padded:
below it the repeated scales would outweigh the codes."""


class TensorRTDialect(Dialect):
    """Collects in `layers` how every quantized layer was stored."""

    def __init__(self) -> None:
        self.layers: list[LoweredLayer] = []

    def linear(self, b: Builder, node: Node) -> ir.Value:
        weight, scale = affine(node), scale_of(node)
        # For an int8 gemm codes ride in int8 whatever their width.
        bits = 8 if node.integer("integer") else weight.bits
        group_size = group_size_of(weight)
        if group_size < 0 and is_int4(weight.codes, bits):
            scale, group_size = repeat_channel_scale(scale, weight.shape[1])
        matrix = self._matrix(b, node.name, numpy_of(weight.codes), scale, bits, group_size, inputs_axis=0)
        y = b.op("MatMul", node.value(0), matrix)
        bias = node.array(2)
        if bias is not None:
            y = b.op("Add", y, b.constant("bias", bias))
        if node.next_ops(MOVES) & CUTS:
            lowest = ml_dtypes.finfo(scale.dtype).min  # type: ignore[no-untyped-call]  # as numpy's, and knows bfloat16
            y = b.op("Max", y, b.constant("lowest", np.array(lowest, scale.dtype)))
        return y

    def conv_weight(self, b: Builder, node: Node) -> ir.Value:
        scale = scale_of(node)
        shape = node.out.shape
        assert shape is not None
        codes = numpy_of(affine(node).codes).reshape(shape.numpy())
        weight = b.constant("weight_codes", codes)
        self._record(node.name, "int8", codes.size, weight, scale)
        scales = b.constant("weight_scale", scale.reshape(-1) if scale.size > 1 else scale[0, 0])
        return b.op("DequantizeLinear", weight, scales, axis=0)

    def matrix(self, b: Builder, node: Node) -> ir.Value:
        weight = affine(node)
        codes, group_size = numpy_of(weight.codes), group_size_of(weight)
        return self._matrix(b, node.name, codes, scale_of(node), weight.bits, group_size, inputs_axis=1)

    def embedding(self, b: Builder, node: Node) -> ir.Value:
        weight = affine(node)
        codes = numpy_of(weight.codes)
        table = self._matrix(b, node.name, codes, scale_of(node), weight.bits, -1, inputs_axis=1)
        return b.op("Gather", table, node.value(1), axis=0)

    def _matrix(
        self, b: Builder, layer: str, codes: Array, scale: Array, bits: int, group_size: int, inputs_axis: int
    ) -> ir.Value:
        """The float matrix of codes [out, in] and scale [out or 1, groups], its inputs along `inputs_axis`."""
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
        self._record(layer, f"{kind} blocks of {block}" if block else kind, codes.size, weight, scale)
        if stored.shape[1] == columns:
            return value
        bounds = {"start": 0, "end": columns, "axis": inputs_axis}
        return b.op("Slice", value, *(b.constant(name, np.array([at], np.int64)) for name, at in bounds.items()))

    def fake_quantize(self, b: Builder, node: Node) -> ir.Value:
        low, high, x = node.integer("quant_min"), node.integer("quant_max"), node.value(0)
        assert x is not None
        kind = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
        scale = node.needed(1).astype(kind)
        if (low, high) != (-128, 127):  # narrower codes ride in int8: clamp to their range first
            x = b.op("Max", x, b.constant("low", (low * scale).astype(kind)))
            x = b.op("Min", x, b.constant("high", (high * scale).astype(kind)))
        scales, zero = b.constant("scale", scale), b.constant("zero_point", np.array(0, np.int8))
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scales, zero), scales, zero)

    def fake_quantize_dynamic(self, b: Builder, node: Node) -> ir.Value:
        raise NotImplementedError("TensorRT has no per-token activations; the backend refuses them before")

    def _record(self, layer: str, kind: str, weights: int, stored: ir.Value, scale: Array) -> None:
        assert stored.const_value is not None
        written = stored.const_value.nbytes + scale.nbytes
        self.layers.append(LoweredLayer(layer, kind, 8 * written / weights, str(stored.name)))


def affine(node: Node) -> AffineWeight:
    """The node's weight; the backend refuses before what is no AffineWeight along the inputs."""
    assert isinstance(node.weight, AffineWeight)
    return node.weight


def scale_of(node: Node) -> Array:
    """The scale [out or 1, groups] of the node's weight."""
    return numpy_of(affine(node).scale)


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
    if is_int4(codes, bits):
        return "int4", b.constant("weight_codes", packed_int4(codes, "weight_codes", signed=True))
    return "int8", b.constant("weight_codes", codes)

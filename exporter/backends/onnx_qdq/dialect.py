"""Neutral nodes -> the standard ONNX operators that onnxruntime runs on its integer kernels.

Measured rules of onnxruntime 1.31 on x86 that shape this file:
- activations uint8 (signed codes shifted by 128), weights int8 in [K, N] with an explicit zero point;
- a bias is added with Sum: Add would merge with a rank-2 MatMul into a Gemm that no integer kernel takes;
- a ReLU straight behind an integer MatMul blocks it, so a layer without bias gets a bias of zeros in front of one;
- per-token activations are uint8 with zero point 128 (the int8 form is 50 times slower);
- DequantizeLinear(W [K, N], block_size) -> MatMul becomes MatMulNBits, which knows blocks of 16 to 256, and whole zero
  points only; the rest of a zero point is a product of its own, of one sum for each group of inputs:
      y = x ((q - r) s)^T + sum(x, group) ((r - z) s)^T,   r = round(z)
- constants are computed while loading, before DequantizeLinear and MatMul are fused, a DequantizeLinear itself is not:
  so the codes may come out of a subgraph, and what no kernel takes is written as Cast and Mul.
"""

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.backends.onnx_qdq.decode import (
    FLOAT,
    ROUNDED_BITS,
    ROUNDED_BLOCK,
    affine_matrix,
    as_nibbles,
    codebook_matrix,
    floats,
    rounded_blocks,
    rounded_channels,
    shaped,
    transposed_matrix,
)
from exporter.backends.onnx_qdq.forms import Form, kernel_block
from exporter.backends.onnx_qdq.functions import in_function
from exporter.backends.onnx_qdq.grids import decoded_grid, direct_grid, from_planes, kernel_codes
from exporter.backends.onnx_qdq.rows import affine_rows, codebook_rows
from exporter.backends.onnx_qdq.tables import joined, table_blocks, table_constants
from exporter.lowering.lowered import LoweredLayer
from exporter.lowering.to_onnx import Array, Builder, Dialect, Node, numpy_of
from passes.ops import TINY_SCALE
from passes.weights import AffineWeight, CodebookWeight, QuantWeight


class OnnxRuntimeDialect(Dialect):
    """Writes every layer in its form, and collects in `layers` how it was stored."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        self.forms = forms
        self.layers: list[LoweredLayer] = []

    # ---- linear ----------------------------------------------------------------------------------------------------

    def linear(self, b: Builder, node: Node) -> ir.Value:
        form, weight, x = self.forms[node.name], node.weight, node.value(0)
        assert x is not None
        if form.kernel == "integer":
            terms = [self._integer_matmul(b, node, affine(node), x)]
        elif form.kernel == "blocks":
            terms = self._block_matmul(b, node, affine(node), x)
        elif form.kernel == "rounded":
            terms = [self._rounded_matmul(b, node, x)]
        else:
            terms = [self._float_matmul(b, node, x)]
        bias = node.array(2)
        if bias is None and len(terms) == 1 and node.next_ops() & {"Relu", "Clip"}:
            bias = np.zeros(weight.shape[0], np.float32)
        if bias is not None:
            terms.append(b.constant("bias", bias))
        return b.op("Sum", *terms) if len(terms) > 1 else terms[0]

    def _integer_matmul(self, b: Builder, node: Node, weight: AffineWeight, x: ir.Value) -> ir.Value:
        """Codes in an int8 container whatever their width: MatMulIntegerToFloat, or MatMulInteger per token."""
        codes, zero, kind = self._integer_codes(b, node.name, weight, None)
        scale = numpy_of(weight.scale)[:, 0]
        per_tensor = scale.size == 1
        token_bits = node.integer("token_bits")
        if not token_bits:
            scales = b.constant("weight_scale", scale[0] if per_tensor else scale)
            self._record(b, node, kind)
            return b.op("MatMul", x, b.op("DequantizeLinear", codes, scales, zero, axis=1))
        self._record(b, node, kind, extra=scale.nbytes)
        row_scale, rows = self._quantize_rows(b, x, token_bits)
        middle = b.constant("row_zero_point", np.array(128, np.uint8))
        sums = b.op("Cast", b.op("MatMulInteger", rows, codes, middle, zero), to=FLOAT)
        return b.op("Mul", b.op("Mul", sums, row_scale), b.constant("weight_scale", scale[0] if per_tensor else scale))

    def _integer_codes(
        self, b: Builder, name: str, weight: AffineWeight, shape: list[int] | None
    ) -> tuple[ir.Value, ir.Value, str]:
        """The codes as int8 in a shape, or else [in, out]; their zero points [out or 1], and what is stored."""
        codes, zeros = numpy_of(weight.codes), weight.zero_point
        codes = np.ascontiguousarray(codes.T) if shape is None else codes.reshape(shape)
        zero_point = np.zeros(weight.scale.shape[0], np.int8) if zeros is None else numpy_of(zeros).reshape(-1)
        if self.forms[name].storage == "decoded":
            kind = f"{codes.dtype.name.removesuffix('8')}4 cast at load to int8"
            value = as_nibbles(b, codes)
        else:
            kind = "int8"
            if zeros is not None:
                codes, zero_point = (codes.astype(np.int16) - 128).astype(np.int8), zero_point - 128
            value = b.constant("weight_codes", codes)
        zero_point = zero_point.astype(np.int8)
        return value, b.constant("weight_zero_point", zero_point if zero_point.size > 1 else zero_point[0]), kind

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

    def _block_matmul(self, b: Builder, node: Node, weight: AffineWeight, x: ir.Value) -> list[ir.Value]:
        """MatMulNBits, and the product with the rest of the zero points where they lie between codes."""
        packed = self.forms[node.name].storage == "decoded"
        block = kernel_block(weight.shape[1], weight.group_size)
        assert block is not None
        codes, kind = kernel_codes(b, weight, packed=packed)
        write_grid = decoded_grid if packed else direct_grid
        grid = write_grid(b, weight, block, planes=from_planes(weight, packed=packed))
        blocks = {"axis": 0, "block_size": block} if weight.scale.shape[1] > 1 else {"axis": 1}
        inputs = [codes, grid.scale] if grid.zero_point is None else [codes, grid.scale, grid.zero_point]
        y = [b.op("MatMul", x, b.op("DequantizeLinear", *inputs, **blocks))]
        if grid.rest is not None:
            y.append(self._rest_of_zeros(b, weight, x, grid.rest))
            kind = f"{kind} blocks and a product of group sums"
        stored = f"{narrow_name(weight)} decoded at load to {kind}" if packed else kind
        self._record(b, node, stored)
        return y

    def _rest_of_zeros(self, b: Builder, weight: AffineWeight, x: ir.Value, rest: ir.Value) -> ir.Value:
        """sum of x over each group, times rest [groups, out]."""
        assert x.shape is not None
        groups = weight.scale.shape[1]
        split = shaped(b, x, [0] * (len(x.shape) - 1) + [groups, weight.shape[1] // groups])
        sums = b.op("ReduceSum", split, b.constant("group_axis", np.array([-1], np.int64)), keepdims=0)
        return b.op("MatMul", sums, rest)

    def _rounded_matmul(self, b: Builder, node: Node, x: ir.Value) -> ir.Value:
        """MatMulNBits with codes of 8 bits, whatever the weight is."""
        weight, blocks = node.weight, f"int{ROUNDED_BITS} blocks of {ROUNDED_BLOCK}"
        if self.forms[node.name].storage == "direct":
            codes, scale = table_constants(weight) if joined(weight) else round_blocks(weight.dequantize().float())
            inputs = [b.constant("weight_codes", codes), b.constant("weight_scale", scale)]
            self._record(b, node, f"{narrow_name(weight)} rounded to {blocks}")
        else:
            inputs = list(table_blocks(b, weight) if joined(weight) else rounded_blocks(b, weight))
            self._record(b, node, f"{narrow_name(weight)} decoded at load to {blocks}")
        return b.op("MatMul", x, b.op("DequantizeLinear", *inputs, axis=0, block_size=ROUNDED_BLOCK))

    def _float_matmul(self, b: Builder, node: Node, x: ir.Value) -> ir.Value:
        weight, in_a_function = node.weight, self.forms[node.name].storage == "function"
        if isinstance(weight, CodebookWeight) and weight.block_scales.shape[1] == 1:  # scales go to the output
            y = b.op("MatMul", x, self._float(b, node, scaled=False))
            scales = np.repeat(numpy_of(weight.block_scales)[:, 0], weight.codebooks.shape[2])
            y = b.op("Mul", y, floats(b, "weight_scales", scales))
        else:
            y = b.op("MatMul", x, self._float(b, node))
        self._record(b, node, f"{narrow_name(weight)} {'in a function, ' if in_a_function else ''}folded at load")
        return y

    def _float(self, b: Builder, node: Node, *, scaled: bool = True) -> ir.Value:
        """The float matrix [in, out], through a function where the form says so."""
        weight = node.weight

        def write(builder: Builder) -> ir.Value:
            if isinstance(weight, CodebookWeight):
                return codebook_matrix(builder, weight, scaled=scaled)
            return transposed_matrix(builder, weight)

        if self.forms[node.name].storage != "function":
            return write(b)
        return in_function(b, "Codebooks" if isinstance(weight, CodebookWeight) else "Grid", write)

    # ---- other layers ----------------------------------------------------------------------------------------------

    def conv_weight(self, b: Builder, node: Node) -> ir.Value:
        shape = node.out.shape
        assert shape is not None
        weight, form = node.weight, self.forms[node.name]
        if form.kernel == "rounded":
            codes, scales = rounded_channels(b, self._matrix(b, weight))
            self._record(b, node, f"{narrow_name(weight)} decoded at load to int{ROUNDED_BITS}")
            value = shaped(b, codes, list(shape.numpy()))
            return b.op("DequantizeLinear", value, scales, axis=0)
        codes, zero, kind = self._integer_codes(b, node.name, affine(node), list(shape.numpy()))
        scale = numpy_of(affine(node).scale)[:, 0]
        scales = b.constant("weight_scale", scale if scale.size > 1 else scale[0])
        self._record(b, node, kind)
        return b.op("DequantizeLinear", codes, scales, zero, axis=0)

    def _matrix(self, b: Builder, weight: QuantWeight) -> ir.Value:
        """The float matrix [out, in]."""
        if isinstance(weight, CodebookWeight):
            return b.op("Transpose", codebook_matrix(b, weight), perm=[1, 0])
        return affine_matrix(b, "weight", weight)

    def matrix(self, b: Builder, node: Node) -> ir.Value:
        weight, kind = node.weight, narrow_name(node.weight)
        if self.forms[node.name].storage == "function":
            name = "CodebookMatrix" if isinstance(weight, CodebookWeight) else "GridMatrix"
            value = in_function(b, name, lambda inner: self._matrix(inner, weight))
            self._record(b, node, f"{kind} in a function, folded at load")
            return value
        value = self._matrix(b, weight)
        self._record(b, node, f"{kind} folded at load")
        return value

    def embedding(self, b: Builder, node: Node) -> ir.Value:
        """Gather packed rows, then decode them: the table is never float, where its form allows."""
        weight, indices = node.weight, node.value(1)
        assert indices is not None
        if self.forms[node.name].kernel == "float":
            table = self._matrix(b, weight)
            self._record(b, node, f"{narrow_name(weight)} folded at load")
            return b.op("Gather", table, indices, axis=0)
        if isinstance(weight, CodebookWeight):
            rows = codebook_rows(b, weight, indices)
        else:
            rows = affine_rows(b, weight, indices)
        self._record(b, node, f"{stored_name(weight)} rows")
        return rows

    # ---- activations -----------------------------------------------------------------------------------------------
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

    def _record(self, b: Builder, node: Node, kind: str, *, extra: int = 0) -> None:
        """What the layer's weight takes: all constants written for it so far."""
        codes = next(value for value in b.constants if "weight_codes" in str(value.name))
        bits = 8 * (b.bytes + extra) / math.prod(node.weight.shape)
        self.layers.append(LoweredLayer(node.name, kind, bits, str(codes.name), self.forms[node.name].why))


def affine(node: Node) -> AffineWeight:
    """The node's weight, where its form is one of an AffineWeight."""
    assert isinstance(node.weight, AffineWeight)
    return node.weight


def narrow_name(weight: QuantWeight) -> str:
    """A weight in the report: int3, uint4, aq_codebook."""
    if isinstance(weight, CodebookWeight):
        return "aq_codebook"
    return f"{'int' if weight.zero_point is None else 'uint'}{weight.bits}"


def stored_name(weight: QuantWeight) -> str:
    """The same of a table, whose codes are packed without regard to their sign."""
    return narrow_name(weight).removeprefix("u")


def round_blocks(matrix: Tensor) -> tuple[Array, Array]:
    """Codes int8 [in, out] and scale [in / block, out] of a float matrix [out, in], as `rounded_blocks` has them."""
    columns = matrix.shape[1]
    blocks = -(-columns // ROUNDED_BLOCK)
    padded = torch.nn.functional.pad(matrix, (0, blocks * ROUNDED_BLOCK - columns)).unflatten(1, (blocks, -1))
    scale = (padded.abs().amax(2, keepdim=True) / (2 ** (ROUNDED_BITS - 1) - 1)).clamp_min(TINY_SCALE)
    codes = (padded / scale).round().to(torch.int8).flatten(1)[:, :columns]
    return numpy_of(codes.t().contiguous()), numpy_of(scale[:, :, 0].t().contiguous())

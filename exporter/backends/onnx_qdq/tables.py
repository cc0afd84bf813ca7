"""Codebooks joined into one table of 8 bits: a layer is then gathered as integers, and never float.

    T[c0, c1, ...] = codebooks[0, c0] + codebooks[1, c1] + ...,   t = max|T| / 127,   Q = round(T / t)
    W[block] = s Q[c0, c1, ...] t

Two codebooks of 8 bits make a table of 65536 entries. Rounding one table instead of every block of the weight costs 4
of the 44 dB that 8 bits have, beside the 10 to 15 dB that codebooks have. But a runtime that computes constants one
by one, and keeps them all until a file is loaded, then needs 4 bytes a weight, not 32.
"""

import dataclasses
import math
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.backends.onnx_qdq.decode import ROUNDED_BITS, ROUNDED_BLOCK, codebook_entries, floats, shaped
from exporter.backends.onnx_qdq.planes import write_codes
from exporter.lowering.to_onnx import Array, Builder, numpy_of
from passes.ops import TINY_SCALE
from passes.weights import CodebookWeight, QuantWeight

JOINED_BITS = 16
TOP = 2 ** (ROUNDED_BITS - 1) - 1


@dataclasses.dataclass(frozen=True)
class Table:
    """Joined codebooks.

    codes   [out / og, in / ig]     int32
    values  [entries, og, ig]       float32, whole numbers
    step    []                      float32
    """

    codes: Tensor
    values: Tensor
    step: Tensor


def joined(weight: QuantWeight) -> TypeGuard[CodebookWeight]:
    """True when the weight's codebooks make one table that is smaller than it, and an output has one scale."""
    if not isinstance(weight, CodebookWeight):
        return False
    bits = weight.codebook_bits * len(weight.codebooks)
    size, entry = weight.codebooks.shape[1], math.prod(weight.codebooks.shape[2:])
    if weight.block_scales.shape[1] > 1 or bits > JOINED_BITS or size != 2**weight.codebook_bits:
        return False
    return bool(2**bits * entry <= math.prod(weight.shape))


def join(weight: CodebookWeight) -> Table:
    """The codebooks as one table of 8 bits."""
    codes, values = weight.codes[:, :, 0].int(), weight.codebooks[0].float()
    for index in range(1, len(weight.codebooks)):
        codes = (codes << weight.codebook_bits) + weight.codes[:, :, index].int()
        values = (values[:, None] + weight.codebooks[index].float()[None]).flatten(0, 1)
    step = (values.abs().max() / TOP).clamp_min(TINY_SCALE)
    return Table(codes, (values / step).round(), step)


def rounded(weight: CodebookWeight) -> CodebookWeight:
    """The weight whose one codebook is the rounded table."""
    table = join(weight)
    return CodebookWeight(table.codes[:, :, None], (table.values * table.step)[None], weight.block_scales)


def table_constants(weight: CodebookWeight) -> tuple[Array, Array]:
    """Codes int8 [in, out] and scale [in / 128, out] as `table_blocks` computes them."""
    table = join(weight)
    whole = CodebookWeight(table.codes[:, :, None], table.values[None], torch.ones_like(weight.block_scales))
    blocks = -(-weight.shape[1] // ROUNDED_BLOCK)
    scale = weight.block_scales[:, 0].float().repeat_interleave(weight.codebooks.shape[2]) * table.step
    codes = whole.dequantize().t().contiguous().to(torch.int8)
    return numpy_of(codes), numpy_of(scale.expand(blocks, -1).contiguous())


def table_blocks(b: Builder, weight: CodebookWeight) -> tuple[ir.Value, ir.Value]:
    """Codes int8 [in, out] and scales [in / 128, out] of the weight."""
    outs, ins, count = weight.codes.shape
    _, size, og, ig = weight.codebooks.shape
    values = codebook_entries(b, weight, 0, flat=True)
    for index in range(1, count):
        other = shaped(b, codebook_entries(b, weight, index, flat=True), [1, size, og * ig])
        values = b.op("Add", shaped(b, values, [-1, 1, og * ig]), other)
        values = shaped(b, values, [size ** (index + 1), og * ig])
    top = b.op("ReduceMax", b.op("Abs", values), keepdims=0)
    step = b.op("Div", top, b.constant("top", np.array(TOP, np.float32)))
    step = b.op("Max", step, b.constant("tiny_scale", np.array(TINY_SCALE, np.float32)))
    table = b.op("QuantizeLinear", values, step, output_dtype=ir.DataType.INT8.value)
    codes = b.op("Gather", table, _codes(b, weight))  # [in / ig, out / og, og ig]
    if og == 1:
        codes = b.op("Transpose", codes, perm=[0, 2, 1])
    else:
        codes = b.op("Transpose", shaped(b, codes, [ins, outs, og, ig]), perm=[0, 3, 1, 2])
    blocks = -(-ins * ig // ROUNDED_BLOCK)
    scales = floats(b, "weight_scales", np.repeat(numpy_of(weight.block_scales)[:, 0], og))
    shape = b.constant("grid_shape", np.array([blocks, outs * og], np.int64))
    return shaped(b, codes, [ins * ig, outs * og]), b.op("Expand", b.op("Mul", scales, step), shape)


def _codes(b: Builder, weight: CodebookWeight) -> ir.Value:
    """Which entry of the table each block is: int32 [in / ig, out / og]."""
    codes = numpy_of(join(weight).codes.t())
    bits = weight.codebook_bits * len(weight.codebooks)
    if bits == JOINED_BITS:
        stored = b.constant("weight_codes", np.ascontiguousarray(codes.astype(np.uint16)))
    else:
        stored = write_codes(b, "weight_codes", codes, bits)
    return b.op("Cast", stored, to=ir.DataType.INT32.value)

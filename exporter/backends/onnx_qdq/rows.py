"""Embeddings: packed rows of a table are picked, then decoded; the table itself is never float.

row i of an AffineWeight      (codes[i] - z[i, g]) s[i, g]
row i of a CodebookWeight     sum over m of codebooks[m, codes[i, :, m]], scaled
"""

import numpy as np
import onnx_ir as ir

from exporter.backends.onnx_qdq.decode import (
    FLOAT,
    codebook_entries,
    codebook_scales,
    grid_values,
    lowest_code,
    shaped,
    unsigned,
)
from exporter.backends.onnx_qdq.planes import cut, write_rows
from exporter.lowering.to_onnx import Builder, numpy_of
from passes.weights import AffineWeight, CodebookWeight


def affine_rows(b: Builder, weight: AffineWeight, indices: ir.Value) -> ir.Value:
    """Rows [..., dim] at `indices` [...]."""
    columns, groups = weight.shape[1], weight.scale.shape[1]
    codes, offset = numpy_of(weight.codes), 0
    width = groups * weight.group_size if groups > 1 else columns
    if weight.bits < 8:
        codes, offset = unsigned(weight), -lowest_code(weight)
    codes = np.pad(codes, ((0, 0), (0, width - columns)))
    rows = b.op("Cast", write_rows(b, "weight_codes", codes, weight.bits, indices), to=FLOAT)
    if offset:
        rows = b.op("Sub", rows, b.constant("weight_offset", np.array(offset, np.float32)))
    leading = [0] * _rank(indices)
    if groups > 1:
        rows = shaped(b, rows, [*leading, groups, weight.group_size])
    for kind, name, values, quantized in (
        ("Sub", "weight_zero_point", weight.zero_point, weight.zero_codes),
        ("Mul", "weight_scale", weight.scale, weight.scale_codes),
    ):
        if values is None:
            continue
        shape = [*values.shape, 1] if groups > 1 else list(values.shape)
        table = grid_values(b, name, values, quantized, shape)
        rows = b.op(kind, rows, b.op("Gather", table, indices, axis=0) if values.shape[0] > 1 else table)
    if groups > 1:
        rows = shaped(b, rows, [*leading, width])
    return rows if width == columns else cut(b, rows, columns, -1)


def codebook_rows(b: Builder, weight: CodebookWeight, indices: ir.Value) -> ir.Value:
    """Rows [..., dim] at `indices` [...], of codebooks whose entries lie in one row."""
    blocks: ir.Value | None = None
    for index in range(weight.codes.shape[2]):
        name = "weight_codes" if index == 0 else f"weight_codes{index}"
        codes = write_rows(b, name, numpy_of(weight.codes[:, :, index]), weight.codebook_bits, indices)
        entries = codebook_entries(b, weight, index, flat=True)
        which = b.op("Cast", codes, to=ir.DataType.INT32.value)
        picked = b.op("Gather", entries, which)  # [..., dim / ig, ig]
        blocks = picked if blocks is None else b.op("Add", blocks, picked)
    scales = codebook_scales(b, weight)
    scale = b.op("Gather", shaped(b, scales, [*weight.block_scales.shape, 1]), indices, axis=0)
    return shaped(b, b.op("Mul", blocks, scale), [0] * _rank(indices) + [weight.shape[1]])


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)

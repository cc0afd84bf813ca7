"""Subgraphs of constants that turn a stored weight into float: a runtime computes them once, when it loads the file.

    matrix [out, in] of an AffineWeight      (codes - z) s, and s and z likewise where they are quantized themselves
    matrix [in, out] of a CodebookWeight     Gather + Gather, scaled; its codes lie in the file as that needs them
    blocks of 8 bits                         s = max|W| / 127 for each block of inputs, codes round(W / s)

Values whose 16-bit form is exact are stored so.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporter.backends.onnx_qdq.planes import cut, write_codes
from exporter.lowering.to_onnx import Array, Builder, numpy_of, packed_int4
from passes.ops import TINY_SCALE
from passes.weights import AffineWeight, CodebookWeight, QuantWeight, value_lines

ROUNDED_BLOCK = 128
"""Inputs that share a scale where a weight is rounded again, to 8 bits."""

ROUNDED_BITS = 8
FLOAT = ir.DataType.FLOAT.value


def floats(b: Builder, name: str, values: Array) -> ir.Value:
    """A constant float32, stored in 16 bits where that loses nothing."""
    values = np.ascontiguousarray(values, np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if values.size < 2 or not np.array_equal(half.astype(np.float32), values):
        return b.constant(name, values)
    return b.op("Cast", b.constant(name, half), to=FLOAT)


def shaped(b: Builder, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The value in another shape."""
    return b.op("Reshape", value, b.constant("shape", np.array(shape, np.int64)))


def padded(b: Builder, value: ir.Value, axis: int, count: int) -> ir.Value:
    """A matrix with `count` zeros behind the end of an axis."""
    pads = [0, 0, count, 0] if axis == 0 else [0, 0, 0, count]
    return b.op("Pad", value, b.constant("pads", np.array(pads, np.int64)))


def lowest_code(weight: AffineWeight) -> int:
    """What the unsigned form of the codes has more: 0 for unsigned ones."""
    return -(2 ** (weight.bits - 1)) if weight.zero_point is None else 0


def unsigned(weight: AffineWeight) -> Array:
    """The codes from 0 up."""
    return (numpy_of(weight.codes).astype(np.int16) - lowest_code(weight)).astype(np.uint8)


def integers(b: Builder, name: str, weight: AffineWeight, codes: Array) -> tuple[ir.Value, int]:
    """The codes [rows, columns] of the weight, in an order of the caller's, as packed as can be; and what to take off.

    4 and 8 bits as tensors of that type, other widths as bit planes of what they are above the lowest code.
    """
    if weight.bits == 4:
        return b.constant(name, packed_int4(codes, name, signed=codes.dtype == np.int8)), 0
    if weight.bits == 8:
        return b.constant(name, codes), 0
    low = lowest_code(weight)
    return write_codes(b, name, (codes.astype(np.int16) - low).astype(np.uint8), weight.bits), -low


def grid_values(
    b: Builder, name: str, values: Tensor | None, quantized: AffineWeight | None, shape: Sequence[int]
) -> ir.Value | None:
    """Scales or zero points in a shape of the caller's, from their own codes where they have any."""
    if values is None:
        return None
    if quantized is None:
        return floats(b, name, numpy_of(values).reshape(shape))
    return shaped(b, affine_matrix(b, name, quantized), shape)


def affine_matrix(b: Builder, name: str, weight: AffineWeight) -> ir.Value:
    """The float matrix [out, in] of the weight; `name` leads the names of its constants."""
    rows, columns = weight.shape
    codes = numpy_of(weight.codes)
    groups = weight.scale.shape[weight.axis]
    width = columns
    if weight.axis == 0:
        grouped, shape = [-1, weight.scale.shape[0], columns], [1, *weight.scale.shape]
    elif groups > 1:
        width = groups * weight.group_size
        grouped, shape = [rows, groups, weight.group_size], [weight.scale.shape[0], groups, 1]
    else:
        grouped, shape = [], list(weight.scale.shape)
    stored, offset = integers(b, f"{name}_codes", weight, codes)
    value = b.op("Cast", stored, to=FLOAT)
    if width > columns:  # a short last group is filled up
        value = padded(b, value, 1, width - columns)
    if grouped:
        value = shaped(b, value, grouped)
    if offset:
        value = b.op("Sub", value, b.constant(f"{name}_offset", np.array(offset, np.float32)))
    zero = grid_values(b, f"{name}_zero_point", weight.zero_point, weight.zero_codes, shape)
    if zero is not None:
        value = b.op("Sub", value, zero)
    value = b.op("Mul", value, grid_values(b, f"{name}_scale", weight.scale, weight.scale_codes, shape))
    if grouped:
        value = shaped(b, value, [rows, width])
    return value if width == columns else cut(b, value, columns, 1)


def codebook_matrix(
    b: Builder, weight: CodebookWeight, *, scaled: bool = True, shape: Sequence[int] | None = None
) -> ir.Value:
    """The float matrix transposed, [in, out] or in another `shape`; without its scales where `scaled` is False."""
    outs, ins, count = weight.codes.shape
    _, _, og, ig = weight.codebooks.shape
    flat = og == 1
    blocks: ir.Value | None = None
    for index in range(count):
        entries = codebook_entries(b, weight, index, flat=flat)
        name = "weight_codes" if index == 0 else f"weight_codes{index}"
        codes = write_codes(b, name, numpy_of(weight.codes[:, :, index].t()), weight.codebook_bits)
        picked = b.op(
            "Gather", entries, b.op("Cast", codes, to=ir.DataType.INT32.value)
        )  # [in / ig, out / og, (og,) ig]
        blocks = picked if blocks is None else b.op("Add", blocks, picked)
    assert blocks is not None
    if scaled:
        scales = b.op("Transpose", codebook_scales(b, weight), perm=[1, 0])
        blocks = b.op("Mul", blocks, shaped(b, scales, [-1, outs, 1] if flat else [-1, outs, 1, 1]))
    blocks = b.op("Transpose", blocks, perm=[0, 2, 1] if flat else [0, 3, 1, 2])
    return shaped(b, blocks, shape or [ins * ig, outs * og])


def codebook_entries(b: Builder, weight: CodebookWeight, index: int, *, flat: bool) -> ir.Value:
    """Codebook `index` [entries, og, ig], or `flat` [entries, og ig]: its values, or its table and which each is."""
    codebook, bits, groups = weight.codebooks[index], weight.codebook_value_bits, weight.codebook_value_groups
    entries, og, ig = codebook.shape
    shape = [entries, og * ig] if flat else [entries, og, ig]
    name = f"codebook{index}"
    if not bits:
        return floats(b, name, numpy_of(codebook).reshape(shape))
    values = _from_table(b, name, numpy_of(value_lines(codebook[None], groups)), bits)
    if groups:
        values = b.op("Transpose", shaped(b, values, [groups, og * ig, entries // groups]), perm=[0, 2, 1])
    return shaped(b, values, shape)


def codebook_scales(b: Builder, weight: CodebookWeight) -> ir.Value:
    """The scales [out / og, 1 or in / ig]: values, or a table a row and which of it each is."""
    scales = numpy_of(weight.scales)
    if not weight.scale_bits or scales.shape[1] <= 2**weight.scale_bits:
        stored = floats(b, "weight_scales", scales)
    else:
        stored = _from_table(b, "weight_scales", scales, weight.scale_bits)
    (rows, columns), wanted = scales.shape, list(weight.block_scales.shape)
    if [rows, columns] == wanted:
        return stored
    spread = b.constant("shape", np.array([rows, wanted[0] // rows, columns, wanted[1] // columns], np.int64))
    return shaped(b, b.op("Expand", shaped(b, stored, [rows, 1, columns, 1]), spread), wanted)


def _from_table(b: Builder, name: str, values: Array, bits: int) -> ir.Value:
    """Values [rows, n], at most 2^bits different ones in a row, as a table and codes."""
    tables = np.zeros((len(values), 2**bits), np.float32)
    codes = np.zeros(values.shape, np.uint32)
    for row, line in enumerate(values):
        found, codes[row] = np.unique(line, return_inverse=True)
        tables[row, : found.size] = found
    which = b.op("Cast", write_codes(b, f"{name}_codes", codes, bits), to=ir.DataType.INT32.value)
    return b.op("GatherElements", floats(b, f"{name}_table", tables), which, axis=1)


def rounded_blocks(b: Builder, weight: QuantWeight) -> tuple[ir.Value, ir.Value]:
    """Codes int8 [in, out] and scales [in / 128, out] of the weight rounded to 8 bits in blocks of inputs.

    Every float value here is as large as the float weight, and onnxruntime frees none before all are computed: so the
    matrix is brought to [blocks, 128, out] only.
    """
    rows, columns = weight.shape
    blocks = -(-columns // ROUNDED_BLOCK)
    shape = [blocks, ROUNDED_BLOCK, rows]
    if columns % ROUNDED_BLOCK:
        matrix = transposed_matrix(b, weight)
        value = shaped(b, padded(b, matrix, 0, blocks * ROUNDED_BLOCK - columns), shape)
    else:
        value = transposed_matrix(b, weight, shape)
    scale = _step(b, value, 1, keep=True)
    kind = ir.DataType.INT8.value
    codes = b.op("QuantizeLinear", value, scale, axis=1, block_size=ROUNDED_BLOCK, output_dtype=kind)
    codes = shaped(b, codes, [blocks * ROUNDED_BLOCK, rows])
    if columns % ROUNDED_BLOCK:
        codes = cut(b, codes, columns, 0)
    return codes, shaped(b, scale, [blocks, rows])


def transposed_matrix(b: Builder, weight: QuantWeight, shape: Sequence[int] | None = None) -> ir.Value:
    """The float matrix [in, out], or its numbers in another shape."""
    if isinstance(weight, CodebookWeight):
        return codebook_matrix(b, weight, shape=shape)
    matrix = b.op("Transpose", affine_matrix(b, "weight", weight), perm=[1, 0])
    return matrix if shape is None else shaped(b, matrix, shape)


def rounded_channels(b: Builder, matrix: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes int8 [out, in] and scale [out] of the float matrix [out, in] rounded to 8 bits, one scale a channel."""
    scale = _step(b, matrix, 1)
    return b.op("QuantizeLinear", matrix, scale, axis=0, output_dtype=ir.DataType.INT8.value), scale


def _step(b: Builder, value: ir.Value, axis: int, *, keep: bool = False) -> ir.Value:
    """max|value| / 127 along `axis`, without the float copy that Abs would make."""
    along = b.constant("axis", np.array([axis], np.int64))
    high = b.op("ReduceMax", value, along, keepdims=int(keep))
    low = b.op("Neg", b.op("ReduceMin", value, along, keepdims=int(keep)))
    top = b.constant("top", np.array(2 ** (ROUNDED_BITS - 1) - 1, np.float32))
    step = b.op("Div", b.op("Max", high, low), top)
    return b.op("Max", step, b.constant("tiny_scale", np.array(TINY_SCALE, np.float32)))


def as_nibbles(b: Builder, codes: Array) -> ir.Value:
    """Codes of at most 4 bits as an int8 value, stored in 4."""
    signed = codes.dtype == np.int8
    packed = ir.tensor(codes.astype(ml_dtypes.int4 if signed else ml_dtypes.uint4))
    return b.op("Cast", b.constant("weight_codes", packed), to=ir.DataType.INT8.value)

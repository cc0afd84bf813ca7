"""Weights of few bits that stay packed in an engine of native layers: the float matrix is made again at every run.

TensorRT folds what it can compute from constants while it builds, a packed weight back to float with it; it does not
fold DequantizeLinear and Gather. (Measured on TensorRT-RTX 1.7: ten 3-bit codes in an int32, divided and masked, become
6.5 times the float16 weight.) So a byte b of packed bits enters as int8 b - 128, by DequantizeLinear with a scale of 1,
and is an index from then on:

    codes of 4 bits      int4, by DequantizeLinear with a scale of 1
    8 bits               b itself
    fewer                planes of 2 and 1 bits: b picks row b of a table [256, 4 or 8] of the codes it holds
    codebook entries     b picks the entry; codes of more than 8 bits are b1 256 + b0

Of the forms that were measured this is the smallest within 2 % (bytes of whole words of 3 codes are divided, which is
more work), and the only one without integer division.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from exporter.lowering.to_onnx import Array, Builder, numpy_of, packed_int4
from passes.weights import AffineWeight, CodebookWeight

BYTE = 8
MIDDLE = 128
Kind = np.dtype[np.generic]
INT32 = ir.DataType.INT32.value
CODES = "weight_codes"
"""How the names of all packed initializers begin, behind the layer's name."""


def affine_matrix(b: Builder, weight: AffineWeight, kind: Kind) -> ir.Value:
    """The float matrix [out, in] of the weight: (codes - zero) scale."""
    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    width = groups * weight.group_size if weight.axis == 1 and groups > 1 else columns
    lowest = -(2 ** (weight.bits - 1)) if weight.zero_point is None else 0
    codes = np.pad(numpy_of(weight.codes).astype(np.int16) - lowest, ((0, 0), (0, width - columns)))
    value = float_codes(b, CODES, codes, weight.bits, lowest, kind)
    shape: list[int] = list(weight.scale.shape)
    if weight.axis == 0:
        value, shape = reshaped(b, value, [-1, weight.scale.shape[0], columns]), [1, *shape]
    elif groups > 1:
        value, shape = reshaped(b, value, [rows, groups, -1]), [*shape, 1]
    if weight.zero_point is not None:
        zero = grid(b, f"{CODES}_of_zero", weight.zero_point, weight.zero_codes, shape, kind)
        value = b.op("Sub", value, zero)
    value = b.op("Mul", value, grid(b, f"{CODES}_of_scale", weight.scale, weight.scale_codes, shape, kind))
    if weight.axis == 0 or groups > 1:
        value = reshaped(b, value, [rows, width])
    return value if width == columns else cut(b, value, columns, 1)


def grid(
    b: Builder,
    name: str,
    values: Tensor,
    quantized: AffineWeight | None,
    shape: Sequence[int],
    kind: Kind,
) -> ir.Value:
    """Scales or zero points in a shape of the caller's; from their own codes, where they have any."""
    if quantized is None:
        return b.constant(name.replace(f"{CODES}_of", "weight"), numpy_of(values).astype(kind).reshape(shape))
    value = reshaped(b, affine_matrix_of_meta(b, name, quantized), shape)
    return value if kind == np.float32 else b.op("Cast", value, to=ir.DataType.from_numpy(kind).value)


def affine_matrix_of_meta(b: Builder, name: str, weight: AffineWeight) -> ir.Value:
    """The values of quantized scales or zero points [n], a byte each: a DequantizeLinear of blocks, and a shift.

    (codes - z) s = (codes - 128) s + (128 - z) s, in float32: the two nearly cancel.
    """
    count = weight.codes.numel()
    groups = weight.scale.shape[1]
    group = weight.group_size if groups > 1 else count
    middle = MIDDLE if weight.zero_point is not None else 0
    codes = numpy_of(weight.codes).astype(np.int16).reshape(-1) - middle
    blocks = np.pad(codes, (0, groups * group - count)).reshape(groups, group).astype(np.int8)
    scale = weight.scale.numpy().reshape(groups)
    scales = b.constant(f"{name}_scale", scale.astype(np.float32))
    value = b.op("DequantizeLinear", b.constant(name, blocks), scales, axis=0)
    if weight.zero_point is not None:
        shift = (middle - weight.zero_point.numpy().reshape(groups)) * scale
        value = b.op("Add", value, b.constant(f"{name}_shift", shift.astype(np.float32).reshape(groups, 1)))
    value = reshaped(b, value, [groups * group])
    return value if count == groups * group else cut(b, value, count, 0)


def float_codes(b: Builder, name: str, codes: Array, bits: int, lowest: int, kind: Kind) -> ir.Value:
    """Codes [rows, columns] from 0 to 2^bits - 1 as floats, `lowest` added."""
    rows, columns = codes.shape
    if bits == 4 and codes.size % 2 == 0:
        shift = BYTE if lowest == 0 else -lowest
        stored = b.constant(name, packed_int4((codes - shift).astype(np.int8), name, signed=True))
        return shifted(b, unscaled(b, stored, kind), lowest + shift, kind)
    if bits > 3:
        stored = b.constant(name, (codes - MIDDLE).astype(np.int8))
        return shifted(b, unscaled(b, stored, kind), lowest + MIDDLE, kind)
    total: ir.Value | None = None
    below = 0
    for width in (width for width in (2, 1) if bits & width):
        plane = pack_plane((codes.astype(np.uint8) >> np.uint8(below)) & np.uint8(2**width - 1), width)
        label = name if total is None else f"{name}_high"
        table = shared_table(b, width, 2**below, lowest if total is None else 0, kind)
        part = b.op("Gather", table, byte_index(b, label, plane))
        part = reshaped(b, part, [rows, -1])
        total = part if total is None else b.op("Add", total, part)
        below += width
    assert total is not None
    return total if columns % BYTE == 0 else cut(b, total, columns, 1)


def pack_plane(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Codes [rows, columns] of `width` bits -> uint8 [rows, whole bytes], the first in the lowest bits.

    Rows are filled up to a multiple of 8 codes, so that all planes of a weight are equally long.
    """
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % BYTE)))
    pieces = padded.reshape(len(codes), -1, BYTE // width) << (width * np.arange(BYTE // width, dtype=np.uint8))
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(pieces, axis=2).astype(np.uint8)
    return packed


def unpacking_table(width: int) -> NDArray[np.int64]:
    """The codes [256, 8 / width] that each byte holds."""
    table: NDArray[np.int64] = (np.arange(256)[:, None] >> (width * np.arange(BYTE // width))) & (2**width - 1)
    return table


def shared_table(b: Builder, width: int, factor: int, lowest: int, kind: Kind) -> ir.Value:
    """The table of a plane's values, code factor + lowest; one for all layers, which an engine holds once."""
    name = f"unpack.{width}.{factor}.{lowest}.{np.dtype(kind).name}"
    known = b.model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor((unpacking_table(width) * factor + lowest).astype(kind), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    b.model.graph.register_initializer(value)
    return value


def codebook_matrix(b: Builder, weight: CodebookWeight, kind: Kind) -> ir.Value:
    """The float matrix [out, in]: the entries that the codes pick, added up and scaled."""
    outs, ins, count = weight.codes.shape
    _, entries, og, ig = weight.codebooks.shape
    codes = numpy_of(weight.codes).astype(np.int32).reshape(outs, ins * count)
    index = code_index(b, CODES, codes, weight.codebook_bits)
    index = reshaped(b, index, [outs, ins, count])
    if count > 1:  # all codebooks as one, each behind the other
        offsets = (np.arange(count) * entries).astype(np.int32).reshape(1, 1, count)
        index = b.op("Add", index, b.constant("codebook_start", offsets))
    books = numpy_of(weight.codebooks)
    if weight.codebook_value_bits and not weight.codebook_value_groups:
        table = from_tables(b, "codebook", books.reshape(count, -1), weight.codebook_value_bits, kind)
        table = reshaped(b, table, [count * entries, og * ig])
    else:
        stored = narrowed(books.astype(kind))
        table = b.constant("codebook", stored.reshape(count * entries, og * ig))
    blocks = of_kind(b, b.op("Gather", table, index), table, kind)  # [outs, ins, count, og ig]
    if count > 1:
        blocks = b.op("ReduceSum", blocks, b.constant("codebook_axis", np.array([2], np.int64)), keepdims=0)
    blocks = reshaped(b, blocks, [outs, ins, og, ig])
    scales = numpy_of(weight.block_scales)
    if weight.scale_bits and scales.shape[1] > 2**weight.scale_bits:
        scale = from_tables(b, "scale", scales, weight.scale_bits, kind)
        scale = reshaped(b, scale, [outs, ins, 1, 1])
    else:
        # TensorRT folds a Cast of a constant, and does not fold a Gather by one index.
        held = b.constant("weight_scale", narrowed(scales.astype(kind)).reshape(1, outs, -1, 1, 1))
        first = b.op("Gather", held, b.constant("first", np.zeros(1, np.int32)), axis=0)
        scale = of_kind(b, reshaped(b, first, [outs, -1, 1, 1]), held, kind)
    blocks = b.op("Mul", blocks, scale)
    if og > 1:
        blocks = b.op("Transpose", blocks, perm=[0, 2, 1, 3])
    return reshaped(b, blocks, [outs * og, ins * ig])


def from_tables(b: Builder, name: str, values: Array, bits: int, kind: Kind) -> ir.Value:
    """Values [rows, n] of which a row has at most 2^bits different ones: a table for each row, and which each is."""
    tables = np.zeros((len(values), 2**bits), np.float32)
    which = np.zeros(values.shape, np.int32)
    for row, line in enumerate(values):
        found, which[row] = np.unique(line, return_inverse=True)
        tables[row, : found.size] = found
    index = code_index(b, f"{CODES}_of_{name}", which, bits)
    start = (np.arange(len(values)) * 2**bits).astype(np.int32).reshape(-1, 1)
    index = b.op("Add", index, b.constant(f"{name}_start", start))
    return b.op("Gather", b.constant(f"{name}_table", tables.astype(kind).reshape(-1)), index)


def code_index(b: Builder, name: str, codes: NDArray[np.int32], bits: int) -> ir.Value:
    """Codes [rows, columns] of up to 16 bits as int32 indices."""
    low = byte_index(b, name, codes & (2**BYTE - 1))
    if bits <= BYTE:
        return low
    high = byte_index(b, f"{name}_high", codes >> BYTE)
    return b.op("Add", low, b.op("Mul", high, b.constant("high_factor", np.array(2**BYTE, np.int32))))


def byte_index(b: Builder, name: str, values: Array) -> ir.Value:
    """Values 0 to 255 as int32, stored in int8."""
    stored = b.constant(name, np.ascontiguousarray(values.astype(np.int16) - MIDDLE).astype(np.int8))
    value = b.op("Cast", unscaled(b, stored, np.dtype(np.float32)), to=INT32)
    return b.op("Add", value, b.constant("middle", np.array(MIDDLE, np.int32)))


def narrowed(values: Array) -> Array:
    """The values in float16, where that is half the room and changes none."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if values.dtype == np.float32 and np.array_equal(half, values) else values


def of_kind(b: Builder, value: ir.Value, stored: ir.Value, kind: Kind) -> ir.Value:
    """A value made of constants that `narrowed` may have stored, in its own type again."""
    wanted = ir.DataType.from_numpy(kind)
    return value if stored.dtype == wanted else b.op("Cast", value, to=wanted.value)


def unscaled(b: Builder, stored: ir.Value, kind: Kind) -> ir.Value:
    """Integers as floats, by an operator that TensorRT does not fold."""
    return b.op("DequantizeLinear", stored, b.constant("one", np.array(1, kind)))


def shifted(b: Builder, value: ir.Value, offset: int, kind: Kind) -> ir.Value:
    """The value plus an integer."""
    return b.op("Add", value, b.constant("offset", np.array(offset, kind))) if offset else value


def reshaped(b: Builder, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The value in another shape."""
    return b.op("Reshape", value, b.constant("shape", np.array(shape, np.int64)))


def cut(b: Builder, value: ir.Value, size: int, axis: int) -> ir.Value:
    """The first `size` of an axis."""
    bounds = {"start": 0, "end": size, "axis": axis}
    return b.op("Slice", value, *(b.constant(name, np.array([at], np.int64)) for name, at in bounds.items()))

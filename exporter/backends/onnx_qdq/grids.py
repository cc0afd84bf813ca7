"""What MatMulNBits reads beside the codes: scales, whole zero points, and what is left of zero points between codes.

    W[k, n] = (q - z) s = (q - r) s + (r - z) s,   r = round(z) within the codes' own type

The second term is one number for each group of inputs and output: `rest` [groups, out].
"""

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from exporter.backends.onnx_qdq.decode import grid_values, lowest_code, shaped, unsigned
from exporter.backends.onnx_qdq.planes import write_codes
from exporter.lowering.fuse import has_whole_zeros
from exporter.lowering.to_onnx import Array, Builder, numpy_of, packed_int4
from passes.weights import AffineWeight

NIBBLE = 4


@dataclasses.dataclass(frozen=True)
class Grid:
    """The inputs of a DequantizeLinear [in, out] beside its codes, and the rest of the zero points if there is one.

    Scales and zero points are [groups, out], or [out] for one group.
    """

    scale: ir.Value
    zero_point: ir.Value | None
    rest: ir.Value | None


def kernel_codes(b: Builder, weight: AffineWeight, *, packed: bool) -> tuple[ir.Value, str]:
    """The codes [in, out] in a type that MatMulNBits reads, and its name; `packed`: from bit planes if those are less.

    Bit planes give unsigned codes; symmetric ones then have the middle code as their zero point.
    """
    if from_planes(weight, packed=packed):
        decoded = write_codes(b, "weight_codes", unsigned(weight).T, weight.bits)
        if weight.bits > NIBBLE:
            return decoded, "uint8"
        return b.op("Cast", decoded, to=ir.DataType.UINT4.value), "uint4"
    codes = np.ascontiguousarray(numpy_of(weight.codes).T)
    if weight.bits > NIBBLE:
        return b.constant("weight_codes", codes), str(codes.dtype)
    signed = weight.zero_point is None
    return b.constant("weight_codes", packed_int4(codes, "", signed=signed)), "int4" if signed else "uint4"


def from_planes(weight: AffineWeight, *, packed: bool) -> bool:
    """True when the codes are stored as bit planes."""
    return packed and weight.bits not in (NIBBLE, 8)


def direct_grid(b: Builder, weight: AffineWeight, block: int, *, planes: bool) -> Grid:
    """Constants as the kernel reads them."""
    scale = per_block(weight, numpy_of(weight.scale), block).astype(np.float32)
    zero: NDArray[np.float32] | None = None
    if weight.zero_point is not None:
        zero = per_block(weight, numpy_of(weight.zero_point), block).astype(np.float32)
    elif planes:
        zero = np.full(scale.shape, -lowest_code(weight), np.float32)
    scales = b.constant("weight_scale", _flat(scale))
    if zero is None:
        return Grid(scales, None, None)
    whole = np.clip(np.round(zero), 0, top_code(weight))
    rest = None
    if not has_whole_zeros(weight):
        groups = slice(None, None, scale.shape[0] // weight.scale.shape[1])
        rest = b.constant("weight_rest", ((whole - zero) * scale)[groups])
    return Grid(scales, _zeros(b, weight, _flat(whole)), rest)


def decoded_grid(b: Builder, weight: AffineWeight, block: int, *, planes: bool) -> Grid:
    """The same out of the scales and zero points as they are stored, which may be codes."""
    scale = _transposed(b, "weight_scale", weight, weight.scale, weight.scale_codes)
    if has_whole_zeros(weight):
        values: Array | None = None if weight.zero_point is None else numpy_of(weight.zero_point)
        if values is None and planes:
            values = np.full(tuple(weight.scale.shape), -lowest_code(weight))
        zeros = None if values is None else _zeros(b, weight, _flat(per_block(weight, values, block)))
        return Grid(_blocks(b, scale, weight, block), zeros, None)
    assert weight.zero_point is not None
    zero = _transposed(b, "weight_zero_point", weight, weight.zero_point, weight.zero_codes)
    bounds = [b.constant(name, np.array(value, np.float32)) for name, value in (("low", 0), ("high", top_code(weight)))]
    whole = b.op("Clip", b.op("Round", zero), *bounds)
    rest = b.op("Mul", b.op("Sub", whole, zero), scale)
    codes = b.op("Cast", _blocks(b, whole, weight, block), to=ir.DataType.UINT8.value)
    if weight.bits <= NIBBLE:
        codes = b.op("Cast", codes, to=ir.DataType.UINT4.value)
    return Grid(_blocks(b, scale, weight, block), codes, rest)


def _transposed(
    b: Builder, name: str, weight: AffineWeight, values: Tensor, quantized: AffineWeight | None
) -> ir.Value:
    """Scales or zero points [out or 1, groups], from their own codes where they have any -> [groups, out]."""
    value = grid_values(b, name, values, quantized, list(values.shape))
    assert value is not None
    value = b.op("Transpose", value, perm=[1, 0])
    if values.shape[0] == weight.shape[0]:
        return value
    return b.op("Expand", value, b.constant("grid_shape", np.array([values.shape[1], weight.shape[0]], np.int64)))


def whole_zeros(weight: AffineWeight) -> AffineWeight:
    """The weight with its zero points where the kernel has them."""
    assert weight.zero_point is not None
    zeros = weight.zero_point.round().clamp(0, top_code(weight))
    return dataclasses.replace(weight, zero_point=zeros, zero_codes=None)


def top_code(weight: AffineWeight) -> int:
    """The largest code of the type that holds the weight's."""
    return 2**NIBBLE - 1 if weight.bits <= NIBBLE else 255


def per_block(weight: AffineWeight, values: Array, block: int) -> Array:
    """Values [out or 1, groups] of a weight -> [blocks, out], repeated where a group is several blocks."""
    rows, columns = weight.shape
    values = np.broadcast_to(values, (rows, values.shape[1])).T
    if values.shape[0] == 1:
        return values
    return np.repeat(values, weight.group_size // block, axis=0)[: -(-columns // block)]


def _blocks(b: Builder, value: ir.Value, weight: AffineWeight, block: int) -> ir.Value:
    """The same for a value [groups, out]; one group is [out]."""
    groups = weight.scale.shape[1]
    if groups == 1:
        return shaped(b, value, [weight.shape[0]])
    repeat = weight.group_size // block
    if repeat == 1:
        return value
    blocks = -(-weight.shape[1] // block)
    return b.op("Gather", value, b.constant("group_of_block", np.arange(blocks) // repeat), axis=0)


def _zeros(b: Builder, weight: AffineWeight, values: Array) -> ir.Value:
    codes = values.astype(np.uint8)
    return b.constant("weight_zero_point", packed_int4(codes, "", signed=False) if weight.bits <= NIBBLE else codes)


def _flat(values: Array) -> Array:
    return np.ascontiguousarray(values[0] if values.shape[0] == 1 else values)

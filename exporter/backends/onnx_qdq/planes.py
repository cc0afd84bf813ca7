"""Unsigned codes of any width in a file: cut into bit planes of 8, 4, 2 and 1 bits, each packed into whole bytes.

    codes of 3 bits    plane 0: bits 0 and 1, four codes in a byte;  plane 1: bit 2, eight in a byte
    codes of 12 bits   plane 0: bits 0 to 7, a byte each;            plane 1: bits 8 to 11, two in a byte

A plane of w bits of a matrix [rows, columns] is uint8 [step, columns], step = ceil(rows w / 8): byte [r, c] holds rows
r, r + step, r + 2 step, ... of column c from its lowest bits up. A matrix is then had back by shifting, masking and
stacking whole slabs: no row moves between neighbours, and everything stays in uint8. (In words of ten 3-bit codes the
file is 7 % larger, and decoding it takes onnxruntime 1.7 times as long in twice the memory.)
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.lowering.to_onnx import Array, Builder

BYTE = 8


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of codes of `bits`, from the lowest bits up."""
    return (BYTE,) * (bits // BYTE) + tuple(width for width in (4, 2, 1) if bits & width)


def pack_planes(codes: Array, bits: int) -> list[NDArray[np.uint8]]:
    """Codes [rows, columns] from 0 to 2^bits - 1 -> a uint8 [ceil(rows w / 8), columns] for each plane of w bits."""
    planes, below = [], 0
    for width in plane_widths(bits):
        part = (codes.astype(np.uint32) >> below) & (2**width - 1)
        count = BYTE // width
        step = -(-len(part) // count)
        slabs = np.pad(part, ((0, count * step - len(part)), (0, 0))).reshape(count, step, -1)
        shifts = width * np.arange(count, dtype=np.uint32)[:, None, None]
        planes.append(np.bitwise_or.reduce(slabs << shifts, axis=0).astype(np.uint8))
        below += width
    return planes


def write_codes(b: Builder, name: str, codes: Array, bits: int) -> ir.Value:
    """The nodes that give the codes [rows, columns] back from their planes: uint8 up to 8 bits, else int32.

    Rows are counted in slabs, [2, 2, 2, step] for planes down to 1 bit: a plane of w bits is shifted along the first
    axes, as many as make 8 / w, and holds the others. All planes have one shape then, and are reshaped once, joined.
    """
    rows, columns = codes.shape
    if bits > BYTE:
        wide = codes.astype(np.uint32)
        low = b.op("Cast", b.constant(name, (wide & 255).astype(np.uint8)), to=ir.DataType.INT32.value)
        high = b.op("Cast", write_codes(b, f"{name}_high", wide >> BYTE, bits - BYTE), to=ir.DataType.INT32.value)
        return b.op("Add", low, b.op("Mul", high, b.constant("high_factor", np.array(256, np.int32))))
    if bits == BYTE:
        return b.constant(name, codes.astype(np.uint8))
    widths = plane_widths(bits)
    finest = BYTE // widths[-1]
    axes = finest.bit_length() - 1
    step = -(-rows // finest)
    whole = np.pad(codes, ((0, finest * step - rows), (0, 0)))
    total: ir.Value | None = None
    below = 0
    for index, (width, plane) in enumerate(zip(widths, pack_planes(whole, bits), strict=True)):
        moved = (BYTE // width).bit_length() - 1
        held = plane.reshape(*[1] * moved, *[2] * (axes - moved), step, columns)
        shifts = width * np.arange(BYTE // width, dtype=np.uint8).reshape(*[2] * moved, *[1] * (axes - moved), 1, 1)
        stored = b.constant(name if index == 0 else f"{name}_plane{index}", held)
        part = b.op("BitShift", stored, b.constant("shifts", shifts), direction="RIGHT")
        part = b.op("BitwiseAnd", part, b.constant("mask", np.array(2**width - 1, np.uint8)))
        total = part if total is None else _joined(b, total, part, below, bits)
        below += width
    assert total is not None
    total = b.op("Reshape", total, b.constant("codes_shape", np.array([finest * step, columns], np.int64)))
    return total if finest * step == rows else cut(b, total, rows, 0)


def cut(b: Builder, value: ir.Value, size: int, axis: int) -> ir.Value:
    """The first `size` of `axis`."""
    bounds = {"start": 0, "end": size, "axis": axis}
    return b.op("Slice", value, *(b.constant(label, np.array([at], np.int64)) for label, at in bounds.items()))


def write_rows(b: Builder, name: str, codes: Array, bits: int, indices: ir.Value | None) -> ir.Value:
    """The nodes that pick rows of codes [rows, columns] at `indices` [...]: [..., columns], uint8, int32 above 8 bits.

    Codes of 8 bits may be signed, and stay so.
    """
    if bits == BYTE:
        return b.op("Gather", b.constant(name, codes), indices)
    columns = codes.shape[1]
    total: ir.Value | None = None
    below = 0
    for index, (width, plane) in enumerate(zip(plane_widths(bits), pack_planes(codes.T, bits), strict=True)):
        label = name if index == 0 else f"{name}_plane{index}"
        picked = b.op("Gather", b.constant(label, np.ascontiguousarray(plane.T)), indices)
        part = picked if width == BYTE else b.op("Concat", *_pieces(b, picked, width), axis=-1)
        if width < BYTE and columns % (BYTE // width):
            part = cut(b, part, columns, -1)
        total = part if total is None else _joined(b, total, part, below, bits)
        below += width
    assert total is not None
    return total


def _joined(b: Builder, total: ir.Value, part: ir.Value, below: int, bits: int) -> ir.Value:
    """What was so far, and a plane whose lowest bit is bit `below` of the codes."""
    if bits <= BYTE:
        raised = b.op("BitShift", part, b.constant("plane_shift", np.array(below, np.uint8)), direction="LEFT")
        return b.op("BitwiseOr", total, raised)
    wide = [b.op("Cast", value, to=ir.DataType.INT32.value) for value in (total, part)]
    return b.op("Add", wide[0], b.op("Mul", wide[1], b.constant("plane_factor", np.array(1 << below, np.int32))))


def _pieces(b: Builder, packed: ir.Value, width: int) -> list[ir.Value]:
    """The codes of each position in the bytes."""
    pieces = []
    mask = b.constant("mask", np.array(2**width - 1, np.uint8))
    for start in range(0, BYTE, width):
        shift = b.constant("shift", np.array(start, np.uint8))
        piece = b.op("BitShift", packed, shift, direction="RIGHT") if start else packed
        pieces.append(b.op("BitwiseAnd", piece, mask) if start + width < BYTE else piece)
    return pieces

"""Codes of 3 bits, ten in an int32: the layout of HQQ, bit for bit.

The codes are taken as the matrix Q [R, C] = codes.reshape(-1, group); without groups, or when the last one is shorter,
as they are, [out, in]. Its rows are cut into ten slabs of step = ceil(R / 10), the last ones filled up with zeros:

    word[r, c] = sum over k of Q[k step + r, c] << (27 - 3 k),    k = 0..9; bits 30 and 31 are 0

For groups of outputs HQQ takes codes.reshape(group, -1), whose few rows leave much of the last slab empty: 64 rows take
the room of 70.

codes       [step, C]                int32; symmetric codes plus 4
zero_point  [ceil(3 groups / 8)]     uint8: a stream of 3-bit numbers, the first in the lowest bits; or floats, or none
scale       [out or 1, groups]       floats
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.affine import AffineFormat
from exporter.formats.base import tensor_of
from exporter.formats.meta import AffineMeta
from passes.weights import AffineWeight, group_columns

SLABS = 10
SHIFTS = tuple(27 - 3 * slab for slab in range(SLABS))
WORDS_AT_ONCE = 1 << 18


class Int3Hqq(AffineFormat):
    """Ten codes in an int32."""

    name: ClassVar[str] = "int3_hqq"
    widths: ClassVar[range] = range(3, 4)

    def pack_matrix(self, weight: AffineWeight) -> Tensor:
        """int32 [ceil(R / 10), C]."""
        codes = weight.codes if weight.zero_point is not None else (weight.codes + 4).view(torch.uint8)
        return pack_codes(codes.reshape(grouped_shape(weight.shape, weight.group_size)))

    def unpack_matrix(self, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Tensor:
        """The codes."""
        rows, columns = grouped_shape(meta.shape, meta.group_size)
        stored = tensor_of(tensors, "codes", torch.int32, (-(-rows // SLABS), columns))
        if bool((stored >> 30).any()):
            raise ValueError("codes have bits above the ten codes of a word")
        codes = unpack_codes(stored, rows).view(meta.shape)
        return codes.view(torch.int8) - 4 if meta.symmetric else codes


def grouped_shape(shape: tuple[int, int], group_size: int) -> tuple[int, int]:
    """[R, C] of the matrix that a weight's codes [out, in] are packed as."""
    rows, columns = shape
    width = group_columns(columns, group_size)
    return shape if columns % width else (rows * columns // width, width)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes 0 to 7 [rows, columns] -> int32 [ceil(rows / 10), columns], as HQQ packs them."""
    rows, columns = codes.shape
    step = -(-rows // SLABS)
    words = torch.zeros(step, columns, dtype=torch.int32, device=codes.device)
    for start, stop in _runs(step, columns):
        for slab, shift in enumerate(SHIFTS):
            part = codes[slab * step + start : min(slab * step + stop, rows)].to(torch.int32)
            words[start : start + len(part)] |= part.bitwise_left_shift_(shift)
    return words


def unpack_codes(packed: Tensor, rows: int) -> Tensor:
    """Words int32 [ceil(rows / 10), columns] -> codes uint8 [rows, columns]."""
    step, columns = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    for start, stop in _runs(step, columns):
        for slab, shift in enumerate(SHIFTS):
            part = codes[slab * step + start : min(slab * step + stop, rows)]
            part.copy_((packed[start : start + len(part)] >> shift).bitwise_and_(7))
    return codes


def _runs(step: int, columns: int) -> list[tuple[int, int]]:
    """Runs of a slab's rows whose words stay in the cache while ten slabs pass over them."""
    count = max(1, WORDS_AT_ONCE // columns)
    return [(start, min(start + count, step)) for start in range(0, step, count)]

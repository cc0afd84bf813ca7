"""Codes of 2 to 4 bits, two in a byte: what block-wise kernels read.

codes       [out, ceil(in / 2)]            uint8: column 2k in the low nibble, 2k + 1 in the high one, a missing
                                           last one zero; symmetric codes as two's complement of 4 bits
zero_point  [ceil(out groups / 2)] or none uint8: nibbles likewise, row after row without a gap
scale       [out or 1, groups]             as in the weight
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.formats.base import Packed, WeightFormat, check_roles, fault_of, meta_of, tensor_of
from passes.weights import AffineWeight


class Int4Group(WeightFormat):
    """Two codes in a byte."""

    name: ClassVar[str] = "int4_group"

    def accepts(self, weight: AffineWeight) -> str:
        """2 to 4 bits, whole zero points."""
        return fault_of(weight) if 2 <= weight.bits <= 4 else f"{weight.bits} bits are not 2 to 4"

    def pack(self, weight: AffineWeight) -> Packed:
        """Shares the scales."""
        self.checked(weight)
        tensors = {"codes": pack_codes(weight.codes), "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = pack_codes(weight.zero_point.to(torch.uint8).reshape(1, -1))[0]
        return Packed(tensors, meta_of(weight))

    def unpack(self, packed: Packed) -> AffineWeight:
        """Shares the scales."""
        check_roles(packed)
        meta, scale = packed.meta, packed.tensors["scale"]
        rows, columns = meta.shape
        stored = tensor_of(packed, "codes", torch.uint8, (rows, -(-columns // 2)))
        codes = unpack_codes(stored, columns, meta.symmetric)
        zero_point = None
        if not meta.symmetric:
            nibbles = tensor_of(packed, "zero_point", torch.uint8, (-(-scale.numel() // 2),))
            flat = unpack_codes(nibbles[None], scale.numel(), symmetric=False)
            zero_point = flat.view(scale.shape).to(scale.dtype)
        return self.checked(AffineWeight(codes, scale, zero_point, meta.bits, meta.group_size))


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [rows, columns] of at most 4 bits, int8 or uint8 -> uint8 [rows, ceil(columns / 2)]."""
    nibbles = F.pad(codes.view(torch.uint8) & 15, (0, codes.shape[1] % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_codes(packed: Tensor, columns: int, symmetric: bool) -> Tensor:
    """Bytes [rows, ceil(columns / 2)] -> codes [rows, columns]: int8 when symmetric, else uint8."""
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :columns].contiguous()
    # Flipping the sign bit and taking its weight off again extends the sign to the whole byte.
    return (codes ^ 8).view(torch.int8) - 8 if symmetric else codes

"""Codes of 5 to 8 bits, one in a byte: what integer kernels multiply.

codes       [out, in]           int8: symmetric codes as they are, asymmetric ones minus 128
zero_point  as scale, or none   int8: minus 128 as well, so that codes - zero_point stays
scale       [out or 1, groups]  as in the weight
"""

from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.base import Packed, WeightFormat, check_roles, fault_of, meta_of, tensor_of
from passes.weights import AffineWeight

MIDDLE = 128
"""What turns unsigned codes into signed ones."""


class Int8Channel(WeightFormat):
    """One code in a byte."""

    name: ClassVar[str] = "int8_channel"

    def accepts(self, weight: AffineWeight) -> str:
        """5 to 8 bits, whole zero points."""
        return fault_of(weight) if 5 <= weight.bits <= 8 else f"{weight.bits} bits are not 5 to 8"

    def pack(self, weight: AffineWeight) -> Packed:
        """Shares the tensors that need no change."""
        self.checked(weight)
        tensors = {"codes": pack_codes(weight.codes), "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = pack_codes(weight.zero_point.to(torch.uint8))
        return Packed(tensors, meta_of(weight))

    def unpack(self, packed: Packed) -> AffineWeight:
        """Shares the tensors that need no change."""
        check_roles(packed)
        meta, scale = packed.meta, packed.tensors["scale"]
        codes = unpack_codes(tensor_of(packed, "codes", torch.int8, meta.shape), meta.symmetric)
        zero_point = None
        if not meta.symmetric:
            stored = tensor_of(packed, "zero_point", torch.int8, tuple(scale.shape))
            zero_point = unpack_codes(stored, symmetric=False).to(scale.dtype)
        return self.checked(AffineWeight(codes, scale, zero_point, meta.bits, meta.group_size))


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [...] as int8: signed ones (int8) as they are, unsigned ones (uint8) minus 128."""
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - MIDDLE).to(torch.int8)


def unpack_codes(packed: Tensor, symmetric: bool) -> Tensor:
    """The codes [...] again: int8 when symmetric, else uint8."""
    return packed if symmetric else (packed.to(torch.int16) + MIDDLE).to(torch.uint8)

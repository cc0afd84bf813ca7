"""Codes of 5 to 8 bits, one in a byte: what integer kernels multiply.

codes       [out, in]                 int8: symmetric codes as they are, asymmetric ones minus 128
zero_point  as scale                  int8: minus 128 as well, so that codes - zero_point stays; or floats, or none
scale       [out or 1, groups]        floats
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.affine import AffineFormat
from exporter.formats.base import tensor_of
from exporter.formats.meta import AffineMeta
from passes.weights import AffineWeight


class Int8Channel(AffineFormat):
    """One code in a byte."""

    name: ClassVar[str] = "int8_channel"
    widths: ClassVar[range] = range(5, 9)

    def pack_matrix(self, weight: AffineWeight) -> Tensor:
        """int8 [out, in]."""
        return pack_codes(weight.codes)

    def unpack_matrix(self, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Tensor:
        """The codes."""
        return unpack_codes(tensor_of(tensors, "codes", torch.int8, meta.shape), meta.symmetric)

    def pack_zeros(self, zeros: Tensor, bits: int) -> Tensor:
        """int8, in the shape of the scales."""
        return pack_codes(zeros)

    def unpack_zeros(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], bits: int) -> Tensor:
        """From int8."""
        return unpack_codes(tensor_of(tensors, "zero_point", torch.int8, shape), symmetric=False)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [...] as int8: signed ones (int8) as they are, unsigned ones (uint8) minus 128."""
    return codes if codes.dtype == torch.int8 else (codes ^ 128).view(torch.int8)  # the top bit is the sign


def unpack_codes(packed: Tensor, symmetric: bool) -> Tensor:
    """The codes [...] again: int8 when symmetric, else uint8."""
    return packed if symmetric else packed.view(torch.uint8) ^ 128

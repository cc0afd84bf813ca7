"""8-bit floats E4M3, one in a byte: what GPUs from sm89 on multiply.

codes       [out, in]             float8_e4m3fn
scale       [out or 1, groups]    floats
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from exporter.formats.affine import AffineFormat
from exporter.formats.base import tensor_of
from exporter.formats.meta import AffineMeta
from passes.ops import E4M3
from passes.weights import AffineWeight


class Fp8Channel(AffineFormat):
    """One number in a byte."""

    name: ClassVar[str] = "fp8_channel"
    widths: ClassVar[range] = range(8, 9)
    float8: ClassVar[bool] = True

    def pack_matrix(self, weight: AffineWeight) -> Tensor:
        """The codes themselves."""
        return weight.codes

    def unpack_matrix(self, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Tensor:
        """The codes."""
        return tensor_of(tensors, "codes", E4M3, meta.shape)

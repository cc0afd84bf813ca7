"""Codes of 3 and 4 bits, two in a byte: what block-wise kernels read.

codes       [out, ceil(in / 2)]        uint8: column 2k in the low nibble, 2k + 1 in the high one, a missing last one
                                       zero; symmetric codes as two's complement of 4 bits
zero_point  [ceil(out groups / 2)]     uint8: nibbles likewise, row after row without a gap; or floats, or none
scale       [out or 1, groups]         floats
"""

from typing import ClassVar

from exporter.formats.affine import BitStreamFormat


class Int4Group(BitStreamFormat):
    """Two codes in a byte."""

    name: ClassVar[str] = "int4_group"
    widths: ClassVar[range] = range(3, 5)

    def width(self, bits: int) -> int:
        """Four, whatever the code's."""
        return 4

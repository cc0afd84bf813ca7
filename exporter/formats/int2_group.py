"""Codes of 1 and 2 bits, eight and four in a byte.

codes       [out, ceil(in bits / 8)]       uint8: column 0 in the lowest bits of byte 0, each next one above, missing
                                           last ones zero; symmetric codes as two's complement of `bits` bits
zero_point  [ceil(out groups bits / 8)]    uint8: as the codes, row after row without a gap; or floats, or none
scale       [out or 1, groups]             floats
"""

from typing import ClassVar

from exporter.formats.affine import BitStreamFormat


class Int2Group(BitStreamFormat):
    """Four or eight codes in a byte."""

    name: ClassVar[str] = "int2_group"
    widths: ClassVar[range] = range(1, 3)

"""Stored weight formats, one per file; a weight is stored in the one it takes the least room in."""

from exporter.formats.aq_codebook import AqCodebook
from exporter.formats.base import Packed, WeightFormat
from exporter.formats.fp8_channel import Fp8Channel
from exporter.formats.int2_group import Int2Group
from exporter.formats.int3_hqq import Int3Hqq
from exporter.formats.int4_group import Int4Group
from exporter.formats.int8_channel import Int8Channel
from passes.weights import QuantWeight

FORMATS: dict[str, WeightFormat] = {
    form.name: form for form in (AqCodebook(), Int2Group(), Int3Hqq(), Int4Group(), Int8Channel(), Fp8Channel())
}
"""Every format by name."""


def pack_smallest(weight: QuantWeight) -> tuple[WeightFormat, Packed]:
    """The weight as stored in the smallest of FORMATS that accepts it, the first of equals.

    Raises ValueError with each one's reason when none does.
    """
    reasons = {form.name: form.accepts(weight) for form in FORMATS.values()}
    found = [(form, form.pack(weight)) for form in FORMATS.values() if not reasons[form.name]]
    if not found:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return min(found, key=lambda pair: pair[1].bits_per_weight)

"""Stored weight formats, one per file; the smallest that holds a weight is chosen."""

from exporter.formats.base import WeightFormat
from exporter.formats.int4_group import Int4Group
from exporter.formats.int8_channel import Int8Channel
from passes.weights import AffineWeight

FORMATS: dict[str, WeightFormat] = {form.name: form for form in (Int4Group(), Int8Channel())}
"""Every format by name, smallest first."""


def choose_format(weight: AffineWeight) -> WeightFormat:
    """The first of FORMATS that accepts the weight. Raises ValueError with each one's reason when none does."""
    reasons = []
    for form in FORMATS.values():
        reason = form.accepts(weight)
        if not reason:
            return form
        reasons.append(f"{form.name}: {reason}")
    raise ValueError("; ".join(reasons))

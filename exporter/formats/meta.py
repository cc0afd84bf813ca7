"""What the tensors of a stored weight do not say, and how it is read from a file's JSON."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from passes.weights import AffineWeight, CodebookWeight

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AffineMeta:
    """How to read the tensors of an AffineWeight back.

    shape       [out, in]
    symmetric   no zero points
    dtype       type of the float values, where they are stored in a shorter one; empty: as stored
    scale, zero_point   how the weight's scales and zero points are stored, where they are quantized themselves
    """

    bits: int
    group_size: int
    shape: tuple[int, int]
    symmetric: bool
    axis: int = 1
    dtype: str = ""
    scale: "AffineMeta | None" = None
    zero_point: "AffineMeta | None" = None

    @classmethod
    def of(cls, weight: AffineWeight, dtype: str) -> "AffineMeta":
        """That of a weight whose float values are `dtype`."""
        return cls(
            weight.bits,
            weight.group_size,
            weight.shape,
            weight.zero_point is None,
            weight.axis,
            dtype,
            None if weight.scale_codes is None else cls.of(weight.scale_codes, dtype),
            None if weight.zero_codes is None else cls.of(weight.zero_codes, dtype),
        )

    @classmethod
    def read(cls, entry: Mapping[str, object]) -> "AffineMeta":
        """From JSON. Raises ValueError or KeyError when an entry is missing or of the wrong kind."""
        rows, columns = integers(entry["shape"])
        scale, zero_point = entry.get("scale"), entry.get("zero_point")
        return cls(
            typed(int, entry["bits"]),
            typed(int, entry["group_size"]),
            (rows, columns),
            typed(bool, entry["symmetric"]),
            typed(int, entry.get("axis", 1)),
            typed(str, entry.get("dtype", "")),
            None if scale is None else cls.read(typed(dict, scale)),
            None if zero_point is None else cls.read(typed(dict, zero_point)),
        )


@dataclasses.dataclass(frozen=True)
class CodebookMeta:
    """How to read the tensors of a CodebookWeight back.

    shape       [out, in]
    block       [og, ig]
    entries     of a codebook
    scale_shape   [rows, columns] of the scales: each is of as many blocks, next to and below each other
    dtype       type of the float values, where they are stored in a shorter one; empty: as stored
    """

    shape: tuple[int, int]
    num_codebooks: int
    entries: int
    block: tuple[int, int]
    scale_shape: tuple[int, int]
    scale_bits: int = 0
    codebook_value_bits: int = 0
    codebook_value_groups: int = 0
    dtype: str = ""

    @classmethod
    def of(cls, weight: CodebookWeight, dtype: str) -> "CodebookMeta":
        """That of a weight whose float values are `dtype`."""
        count, entries, og, ig = weight.codebooks.shape
        return cls(
            weight.shape,
            count,
            entries,
            (og, ig),
            (weight.scales.shape[0], weight.scales.shape[1]),
            weight.scale_bits,
            weight.codebook_value_bits,
            weight.codebook_value_groups,
            dtype,
        )

    @classmethod
    def read(cls, entry: Mapping[str, object]) -> "CodebookMeta":
        """From JSON. Raises ValueError or KeyError when an entry is missing or of the wrong kind."""
        rows, columns = integers(entry["shape"])
        og, ig = integers(entry["block"])
        scale_rows, scale_columns = integers(entry["scale_shape"])
        return cls(
            (rows, columns),
            typed(int, entry["num_codebooks"]),
            typed(int, entry["entries"]),
            (og, ig),
            (scale_rows, scale_columns),
            typed(int, entry.get("scale_bits", 0)),
            typed(int, entry.get("codebook_value_bits", 0)),
            typed(int, entry.get("codebook_value_groups", 0)),
            typed(str, entry.get("dtype", "")),
        )


PackedMeta = AffineMeta | CodebookMeta


def typed(kind: type[T], value: object) -> T:
    """The value itself, when JSON gave it the type it must have (true is no number). Raises ValueError if not."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")
    return value


def integers(value: object) -> tuple[int, ...]:
    """A JSON list of whole numbers. Raises ValueError when it is something else."""
    return tuple(typed(int, number) for number in typed(list, value))

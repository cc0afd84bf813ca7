"""Additive codebooks: a weight's blocks as sums of codebook entries (arXiv 2401.06118).

codes       [out / og, in / ig, M]     uint8 for codes of 8 bits; of other widths up to 16 a stream of bits, uint8
                                       [ceil(out / og * in / ig * M * width / 8)], the first code in the lowest bits
codebooks   [M, entries, og, ig]       floats; 16 bits where that loses nothing
scales      [rows, columns]            likewise; each is of (out / og / rows) x (in / ig / columns) blocks

With codebook_value_bits, instead of `codebooks`, and with scale_bits, instead of `scales`, b being those bits:

codebook_table, scale_table            [lines, 2^b], [rows, 2^b]      the distinct values of a line of codebook values
                                                                      (passes.weights.value_lines), or of a row of
                                                                      scales; filled up with the last one
codebook_indexes, scale_indexes        [ceil(M entries og ig b / 8)], [ceil(number of scales b / 8)]
                                                                      uint8: a stream of b bits, which value each is
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.base import Packed, WeightFormat, check_roles, narrowed, original_type, tensor_of, widened
from exporter.formats.bit_stream import pack_bits, packed_width, unpack_bits
from exporter.formats.meta import CodebookMeta
from passes.weights import CodebookWeight, QuantWeight, from_value_lines, value_lines

MOST_BITS = 16


class AqCodebook(WeightFormat):
    """Codes of codebook entries."""

    name: ClassVar[str] = "aq_codebook"

    def accepts(self, weight: QuantWeight) -> str:
        """Codebook weights that do not contradict themselves."""
        return fault_of(weight) if isinstance(weight, CodebookWeight) else "it holds codebooks only"

    def pack(self, weight: QuantWeight) -> Packed:
        """Shares the tensors that need no change."""
        checked = self._checked(weight)
        codes, width = checked.codes, checked.codebook_bits
        tensors = {"codes": codes if width == 8 else pack_bits(codes.reshape(1, -1), width)[0]}
        if bits := checked.codebook_value_bits:
            table, indexes = _as_table(value_lines(checked.codebooks, checked.codebook_value_groups), bits)
            tensors |= {"codebook_table": narrowed(table), "codebook_indexes": indexes}
        else:
            tensors["codebooks"] = narrowed(checked.codebooks)
        if checked.scale_bits:
            table, indexes = _as_table(checked.scales, checked.scale_bits)
            tensors |= {"scale_table": narrowed(table), "scale_indexes": indexes}
        else:
            tensors["scales"] = narrowed(checked.scales)
        return Packed(tensors, CodebookMeta.of(checked, original_type(checked.codebooks)))

    def unpack(self, packed: Packed) -> CodebookWeight:
        """Shares the tensors that need no change."""
        meta, tensors = packed.meta, packed.tensors
        assert isinstance(meta, CodebookMeta)
        by_table = (meta.codebook_value_bits > 0, meta.scale_bits > 0)
        check_roles(packed, {"codes"} | CODEBOOK_ROLES[by_table[0]] | SCALE_ROLES[by_table[1]])
        (rows, columns), (og, ig) = meta.shape, meta.block
        if min(*meta.shape, og, ig, meta.num_codebooks) < 1 or rows % og or columns % ig:
            raise ValueError(f"a matrix of {rows} x {columns} has no blocks of {og} x {ig}")
        if not 2 <= meta.entries <= 2**MOST_BITS:
            raise ValueError(f"a codebook of {meta.entries} entries is not one of 2 to {2**MOST_BITS}")
        if min(meta.scale_shape) < 1:
            raise ValueError(f"scales have shape {list(meta.scale_shape)}, which holds none")
        if groups := group_fault(meta.entries, meta.codebook_value_groups):
            raise ValueError(groups)
        codes = _unpack_codes(tensors, meta, (rows // og, columns // ig, meta.num_codebooks))
        shape = (meta.num_codebooks, meta.entries, og, ig)
        if by_table[0]:
            lines = meta.num_codebooks * (meta.codebook_value_groups * og * ig or 1)
            values = _from_table("codebook", tensors, (lines, math.prod(shape) // lines), meta.codebook_value_bits)
            codebooks = from_value_lines(values, shape, meta.codebook_value_groups)
        else:
            codebooks = tensor_of(tensors, "codebooks", tensors["codebooks"].dtype, shape)
        if by_table[1]:
            scales = _from_table("scale", tensors, meta.scale_shape, meta.scale_bits)
        else:
            scales = tensor_of(tensors, "scales", tensors["scales"].dtype, meta.scale_shape)
        return self._checked(
            CodebookWeight(
                codes,
                widened(codebooks, meta.dtype),
                widened(scales, meta.dtype),
                meta.scale_bits,
                meta.codebook_value_bits,
                meta.codebook_value_groups,
            )
        )

    def read_meta(self, entry: Mapping[str, object]) -> CodebookMeta:
        """A CodebookMeta."""
        return CodebookMeta.read(entry)

    def _checked(self, weight: QuantWeight) -> CodebookWeight:
        """The weight itself. Raises ValueError with the reason when this format cannot hold it."""
        reason = self.accepts(weight)
        if reason:
            raise ValueError(reason)
        assert isinstance(weight, CodebookWeight)
        return weight


CODEBOOK_ROLES = ({"codebooks"}, {"codebook_table", "codebook_indexes"})
SCALE_ROLES = ({"scales"}, {"scale_table", "scale_indexes"})
"""Roles of values that are stored as they are, and by a table."""


def fault_of(weight: CodebookWeight) -> str:
    """What contradicts the definition of a CodebookWeight; empty when nothing does."""
    codes, codebooks, scales = weight.codes, weight.codebooks, weight.scales
    if codes.dim() != 3 or not codes.numel():
        return f"codes have shape {list(codes.shape)}, not [out / og, in / ig, codebooks]"
    if codebooks.dim() != 4 or not codebooks.numel() or codebooks.shape[0] != codes.shape[2]:
        return f"codebooks have shape {list(codebooks.shape)}, not [{codes.shape[2]}, entries, og, ig]"
    entries = codebooks.shape[1]
    if not 2 <= entries <= 2**MOST_BITS:
        return f"codebooks have {entries} entries, not 2 to {2**MOST_BITS}"
    dtype = torch.uint8 if weight.codebook_bits <= 8 else torch.int32
    if codes.dtype != dtype:
        return f"codes are {codes.dtype}, not {dtype}"
    least, most = (int(value) for value in codes.aminmax())
    if least < 0 or most >= entries:
        return f"codes from {least} to {most} are outside of 0 to {entries - 1}, the entries of a codebook"
    if scales.dim() != 2 or not scales.numel() or codes.shape[0] % scales.shape[0] or codes.shape[1] % scales.shape[1]:
        return f"scales have shape {list(scales.shape)}, which does not divide the {list(codes.shape[:2])} blocks"
    if reason := group_fault(entries, weight.codebook_value_groups):
        return reason
    if not codebooks.is_floating_point() or codebooks.dtype != scales.dtype:
        return f"codebooks and scales are {codebooks.dtype} and {scales.dtype}, not of one floating-point type"
    if not bool(codebooks.isfinite().all()) or not bool(scales.isfinite().all()):
        return "codebooks or scales are not finite"
    lines = value_lines(codebooks, weight.codebook_value_groups)
    tables = (
        ("codebook_value_bits", weight.codebook_value_bits, lines),
        ("scale_bits", weight.scale_bits, scales),
    )
    for name, bits, values in tables:
        if not 0 <= bits <= MOST_BITS:
            return f"{name} {bits} is not 0 to {MOST_BITS}"
        if bits and values.shape[1] > 2**bits and (count := int(_ranks(values)[1].max()) + 1) > 2**bits:
            return f"{count} distinct values do not fit the {2**bits} of {name} {bits}"
    return ""


def group_fault(entries: int, groups: int) -> str:
    """Why a codebook's entries do not fall into so many groups; empty when they do."""
    if 0 <= groups <= entries and (not groups or entries % groups == 0):
        return ""
    return f"{entries} entries of a codebook do not fall into {groups} groups"


def _unpack_codes(tensors: Mapping[str, Tensor], meta: CodebookMeta, shape: tuple[int, int, int]) -> Tensor:
    """The codes of this shape."""
    bits = (meta.entries - 1).bit_length()
    if bits == 8:
        return tensor_of(tensors, "codes", torch.uint8, shape)
    count = shape[0] * shape[1] * shape[2]
    stored = tensor_of(tensors, "codes", torch.uint8, (packed_width(count, bits),))
    return unpack_bits(stored[None], count, bits).view(shape)


def _ranks(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of `values` [rows, n] sorted; the number of distinct smaller ones; and where each value stood."""
    ordered, places = values.sort(dim=1)
    steps = ordered[:, 1:] != ordered[:, :-1]
    ranks = torch.cat([torch.zeros_like(places[:, :1]), steps.cumsum(1)], dim=1)
    return ordered, ranks, places


def _as_table(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(table [rows, 2^bits], indexes as a stream of bits): the distinct values of each row, at most 2^bits."""
    ordered, ranks, places = _ranks(values)
    table = ordered[:, -1:].repeat(1, 2**bits).scatter_(1, ranks, ordered)
    indexes = torch.empty_like(ranks).scatter_(1, places, ranks)
    return table, pack_bits(indexes.view(1, -1), bits)[0]


def _from_table(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> Tensor:
    """Values of this shape from a table for each row."""
    rows, columns = shape
    if not bits <= MOST_BITS:
        raise ValueError(f"tables of {bits} bits are not of 1 to {MOST_BITS}")
    table = tensor_of(tensors, f"{name}_table", tensors[f"{name}_table"].dtype, (rows, 2**bits))
    stored = tensor_of(tensors, f"{name}_indexes", torch.uint8, (packed_width(rows * columns, bits),))
    indexes = unpack_bits(stored[None], rows * columns, bits).view(rows, columns)
    return table.gather(1, indexes.long())

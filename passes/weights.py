"""What a weight algorithm produces: codes, and what turns them back into a float matrix.

AffineWeight    W[o, i] = (codes[o, i] - zero_point[o, g]) scale[o, g],   g = i // group_size           (axis 1)
                W[o, i] = (codes[o, i] - zero_point[h, i]) scale[h, i],   h = o mod (out / group_size)  (axis 0)
CodebookWeight  W[a p + r, b q + c] = scales[a, b] sum_m codebooks[m, codes[a, b, m], r, c],  p = og, q = ig

Symmetric codes of b bits lie in [-2^(b-1), 2^(b-1) - 1] and have no zero point; asymmetric ones in [0, 2^b - 1].
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from passes.ops import E4M3, dequantize, dequantize_codebook, spread_scales


@dataclasses.dataclass(frozen=True)
class AffineWeight:
    """A quantized matrix [out, in]; a convolution's is [out, in / groups * kernel].

    codes        [out, in]          int8 (symmetric) or uint8 (asymmetric); float8_e4m3fn (symmetric, of 8 bits)
    scale        [out or 1, groups] float32; along axis 0: [out / group_size, in]
    zero_point   as scale, or None  float32, whole numbers unless an algorithm says otherwise
    group_size   k: groups of k inputs; -1: one per output channel; 0: one for the tensor
    axis         1: groups along the inputs; 0: groups of group_size outputs, out / group_size apart, of one input
    scale_codes, zero_codes   scale and zero_point as they are stored when they are quantized themselves: matrices
                 [1, number of groups], whose values scale and zero_point hold
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    axis: int = 1
    scale_codes: "AffineWeight | None" = None
    zero_codes: "AffineWeight | None" = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def is_float8(self) -> bool:
        """True when the codes are 8-bit floats."""
        return self.codes.dtype == E4M3

    def dequantize(self) -> Tensor:
        """The float matrix [out, in] this weight stands for."""
        weight: Tensor = dequantize(self.codes, self.scale, self.zero_point, self.bits, self.group_size, self.axis)
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Nominal: code bits, and for each group a 16-bit scale and, if asymmetric, a zero point as wide as its kind.

        A whole zero point takes `bits`, another 16 bits; a quantized scale or zero point what its own codes take.
        """
        count = self.scale.numel()
        scales = self.scale_codes.bits_per_weight * count if self.scale_codes else 16.0 * count
        zeros = 0.0
        if self.zero_codes is not None:
            zeros = self.zero_codes.bits_per_weight * count
        elif self.zero_point is not None:
            whole = bool((self.zero_point == self.zero_point.round()).all())
            zeros = float(self.bits if whole else 16) * count
        return self.bits + (scales + zeros) / self.codes.numel()


@dataclasses.dataclass(frozen=True)
class CodebookWeight:
    """A matrix [out, in] of blocks og x ig, each the sum of one entry of every codebook (arXiv 2401.06118).

    codes          [out / og, in / ig, num_codebooks]          uint8 up to 8 bits, int32 above
    codebooks      [num_codebooks, 2^codebook_bits, og, ig]    float32
    scales         [out / og / h, in / ig / k]                 float32; one for h x k neighbouring blocks: k is in / ig
                                                               where whole rows share one
    scale_bits     0, or a row of scales has at most 2^scale_bits distinct ones, so that a file can hold a table of
                   them and say which each is
    codebook_value_bits   0, or a line of `value_lines` has at most 2^codebook_value_bits distinct values, likewise
    codebook_value_groups   what is a line of those
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    scale_bits: int = 0
    codebook_value_bits: int = 0
    codebook_value_groups: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0] * self.codebooks.shape[2], self.codes.shape[1] * self.codebooks.shape[3]

    @property
    def codebook_bits(self) -> int:
        """Width of a code."""
        return (self.codebooks.shape[1] - 1).bit_length()

    @property
    def block_scales(self) -> Tensor:
        """The scale of every block, [out / og, in / ig], or, where whole rows share one, [out / og, 1]."""
        return spread_scales(self.scales, self.codes.shape)

    def dequantize(self) -> Tensor:
        """The float matrix [out, in] this weight stands for."""
        weight: Tensor = dequantize_codebook(
            self.codes,
            self.codebooks,
            self.scales,
            self.scale_bits,
            self.codebook_value_bits,
            self.codebook_value_groups,
        )
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Nominal: code bits, 16-bit codebook values and scales, or their codes and 16-bit tables."""
        bits = float(self.codes.numel() * self.codebook_bits)
        bits += _table_bits(value_lines(self.codebooks, self.codebook_value_groups), self.codebook_value_bits)
        bits += _table_bits(self.scales, self.scale_bits)
        return bits / math.prod(self.shape)


QuantWeight = AffineWeight | CodebookWeight
"""What any weight algorithm may produce."""


def _table_bits(values: Tensor, bits: int) -> float:
    """Bits of `values` [rows, n] in 16 bits each, or as codes of `bits` into a table of 16-bit values for each row."""
    return float(values.numel() * bits + len(values) * 2**bits * 16) if bits else 16.0 * values.numel()


def value_lines(codebooks: Tensor, groups: int) -> Tensor:
    """Values of codebooks [M, entries, og, ig] in the lines [lines, n] that have a table each.

    groups 0: a codebook is a line. g > 0: its entries fall into g runs; what stands at one place of a block in all
    entries of a run is a line (as in AQLM).
    """
    if not groups:
        return codebooks.flatten(1)
    runs: Tensor = codebooks.unflatten(1, (groups, -1))
    return runs.permute(0, 1, 3, 4, 2).flatten(0, 3)


def from_value_lines(lines: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """The codebooks, of this shape, whose value_lines these are."""
    count, entries, og, ig = shape
    if not groups:
        return lines.view(count, entries, og, ig)
    return lines.view(count, groups, og, ig, -1).permute(0, 1, 4, 2, 3).reshape(count, entries, og, ig)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of `bits` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def group_columns(columns: int, group_size: int) -> int:
    """How many columns share a scale along a row of `columns`."""
    return columns if group_size <= 0 or group_size >= columns else group_size


def code_dtype(symmetric: bool) -> torch.dtype:
    """Storage type of unpacked codes."""
    return torch.int8 if symmetric else torch.uint8

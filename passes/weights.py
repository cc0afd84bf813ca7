"""What a weight algorithm produces: integer codes and what turns them back into a float matrix.

    W[o, i] = (codes[o, i] - zero_point[o, g]) scale[o, g],   g = i // group_size

Symmetric codes of b bits lie in [-2^(b-1), 2^(b-1) - 1] and have no zero point; asymmetric ones in [0, 2^b - 1].
"""

import dataclasses

import torch
from torch import Tensor

from passes.ops import dequantize


@dataclasses.dataclass(frozen=True)
class AffineWeight:
    """A quantized matrix [out, in]; a convolution's is [out, in / groups * kernel].

    codes       [out, in]          int8 (symmetric) or uint8 (asymmetric)
    scale       [out or 1, groups] float32
    zero_point  as scale, or None  float32, whole numbers unless an algorithm says otherwise
    group_size  k: groups of k inputs; -1: one per output channel; 0: one for the tensor
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The float matrix [out, in] this weight stands for."""
        weight: Tensor = dequantize(self.codes, self.scale, self.zero_point, self.bits, self.group_size)
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Nominal: code bits, a 16-bit scale and, if asymmetric, a `bits` wide zero point for each group."""
        per_group = 16 + (0 if self.zero_point is None else self.bits)
        return self.bits + per_group * self.scale.numel() / self.codes.numel()


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of `bits` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def group_columns(columns: int, group_size: int) -> int:
    """How many columns share a scale along a row of `columns`."""
    return columns if group_size <= 0 or group_size >= columns else group_size


def code_dtype(symmetric: bool) -> torch.dtype:
    """Storage type of unpacked codes."""
    return torch.int8 if symmetric else torch.uint8

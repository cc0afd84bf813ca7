"""Fit the scale and zero point of uniform grids to a weight matrix.

Over the weights w that share a scale (zero always inside their range, so that it is a grid point):

    symmetric    s = 2 max|w| / (2^b - 1),             codes clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max w - min w) / (2^b - 1),      codes clamp(round(w / s) + z, 0, 2^b - 1),  z = round(-min w / s)

The symmetric scale is that of the GPTQ authors (arXiv 2210.17323): it spreads all 2^b levels over [-max|w|, max|w|], so
its step is smaller than max|w| / (2^(b-1) - 1), at the price that +max|w| is half a step outside the last level.

`mse` shrinks the range by a common factor and keeps, for each scale, the factor with the least squared error.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.weights import AffineWeight, code_dtype, code_range, group_columns

ScaleSearch = Literal["minmax", "mse"]

SHRINK_FACTORS = tuple(1 - step / 50 for step in range(40))


@dataclasses.dataclass(frozen=True)
class AffineGrid:
    """The levels a weight matrix [out, in] may take.

    scale       [out or 1, groups]       float32, positive
    zero_point  as scale, or None        float32, whole numbers; None: symmetric
    group_size  k: groups of k inputs; -1: one per output channel; 0: one for the tensor
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    def centred_range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest code minus zero point, each shaped as `scale`."""
        low, high = code_range(self.bits, self.zero_point is None)
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        return low - zero, high - zero

    def round(self, weight: Tensor) -> AffineWeight:
        """Every weight [out, in] to its nearest level."""
        low, high = self.centred_range()
        grouped = _grouped(weight.float(), self.group_size)
        codes = torch.round(grouped / self.scale[..., None]).clamp_(low[..., None], high[..., None])
        return self.with_centred_codes(_ungrouped(codes, weight.shape))

    def with_centred_codes(self, centred: Tensor) -> AffineWeight:
        """The quantized weight whose codes minus zero point are `centred` [out, in]."""
        codes = centred
        if self.zero_point is not None:
            width = group_columns(centred.shape[1], self.group_size)
            codes = centred + self.zero_point.repeat_interleave(width, dim=1)[:, : centred.shape[1]]
        stored = codes.to(code_dtype(self.zero_point is None))
        return AffineWeight(stored, self.scale, self.zero_point, self.bits, self.group_size)


def fit_grid(weight: Tensor, bits: int, group_size: int, symmetric: bool, search: ScaleSearch = "minmax") -> AffineGrid:
    """A grid for `weight` [out, in]; groups at least as wide as a row become one per output channel.

    Scales are float32 numbers that the weight's own dtype can hold, so a half-precision graph stores them unchanged.
    """
    if group_size >= weight.shape[1]:
        group_size = -1
    grouped = _grouped(weight.float(), group_size)
    scale, zero_point = _fit_scales(grouped, bits, symmetric, search, weight.dtype)
    return AffineGrid(scale, zero_point, bits, group_size)


def _fit_scales(
    values: Tensor, bits: int, symmetric: bool, search: ScaleSearch, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None when symmetric) [...] of the values [..., n] that share them; rounded to `dtype`."""
    low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    best = _scales_of_range(low, high, bits, symmetric, dtype)
    if search == "minmax":
        return best
    least = _squared_error(values, *best, bits)
    for factor in SHRINK_FACTORS[1:]:
        scale, zero_point = _scales_of_range(low * factor, high * factor, bits, symmetric, dtype)
        error = _squared_error(values, scale, zero_point, bits)
        better = error < least
        least = torch.where(better, error, least)
        if zero_point is None or best[1] is None:
            best = torch.where(better, scale, best[0]), None
        else:
            best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    return best


def _scales_of_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / (2**bits - 1)).to(dtype).float()
    # A range so small that its step underflows is one of zeros, for which any step will do.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    return scale, None if symmetric else torch.round(-low / scale)


def _squared_error(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    low, high = AffineGrid(scale, zero_point, bits, -1).centred_range()
    rounded = torch.round(values / scale[..., None]).clamp_(low[..., None], high[..., None])
    return rounded.mul_(scale[..., None]).sub_(values).square_().sum(-1)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """The weight as [out or 1, groups, n]; a short last group is filled with zeros, which no grid minds."""
    if group_size == 0:
        return weight.reshape(1, 1, -1)
    width = group_columns(weight.shape[1], group_size)
    grouped: Tensor = F.pad(weight, (0, -weight.shape[1] % width)).unflatten(1, (-1, width))
    return grouped


def _ungrouped(grouped: Tensor, shape: torch.Size) -> Tensor:
    if grouped.shape[0] != shape[0]:
        return grouped.view(shape)
    return grouped.flatten(1)[:, : shape[1]]

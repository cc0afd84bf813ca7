"""Fit the scale and zero point of uniform grids to a weight matrix.

Over the weights w that share a scale (zero always inside their range, so that it is a grid point):

    symmetric    s = 2 max|w| / (2^b - 1),             codes clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max w - min w) / (2^b - 1),      codes clamp(round(w / s) + z, 0, 2^b - 1),  z = round(-min w / s)

The symmetric scale is that of the GPTQ authors (arXiv 2210.17323): it spreads all 2^b levels over [-max|w|, max|w|], so
its step is smaller than max|w| / (2^(b-1) - 1), at the price that +max|w| is half a step outside the last level.

A search shrinks the range, which clips a few weights and brings the levels of all others closer. For each scale it
keeps the range with the least sum of a_i (w_i - q_i)^2: first both ends are shrunk by one factor out of SHRINK_FACTORS,
then each end (symmetric: both) by one out of NUDGES more. `mse` counts all weights alike; `hessian` takes for a_i the
diagonal of the layer's Hessian, the error's cost at the layer's output were it the only one.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.weights import AffineWeight, code_dtype, code_range, group_columns

ScaleSearch = Literal["minmax", "mse", "hessian"]

SHRINK_FACTORS = tuple(1 - step / 20 for step in range(16))
NUDGES = (0.8, 0.85, 0.9, 0.95, 0.975, 1.025, 1.05, 1.1, 1.15, 1.2)
"""On top of a shrink factor; no end goes past where it was."""

WEIGHTS_AT_ONCE = 1 << 17
"""Weights searched together, at least one row's: keeps what a search looks at time and again in the cache."""


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


def fit_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: ScaleSearch = "minmax",
    importance: Tensor | None = None,
) -> AffineGrid:
    """A grid for `weight` [out, in]; groups at least as wide as a row become one per output channel.

    `importance` [out or 1, in], zero or more, is what the search "hessian" counts squared errors by; without it, and in
    the other searches, they count alike.
    Scales are float32 numbers that the weight's own dtype can hold, so a half-precision graph stores them unchanged.
    """
    if group_size >= weight.shape[1]:
        group_size = -1
    grouped = _grouped(weight.float(), group_size)
    costs = torch.ones(1, 1, 1)
    if search == "hessian" and importance is not None:
        costs = _grouped(importance.expand_as(weight) if group_size == 0 else importance, group_size)
    costs = costs.expand(len(grouped), -1, -1)
    rows = max(1, WEIGHTS_AT_ONCE // grouped[0].numel())
    parts = zip(grouped.split(rows), costs.split(rows), strict=True)
    ranges = [_fit_range(values, cost, bits, symmetric, search, weight.dtype) for values, cost in parts]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    return AffineGrid(*_scales_of_range(low, high, bits, symmetric, weight.dtype), bits, group_size)


def _fit_range(
    values: Tensor, costs: Tensor, bits: int, symmetric: bool, search: ScaleSearch, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both ends [...] of the range of the values [..., n] that share a scale."""
    low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if search == "minmax":
        return low, high
    best_low, best_high, least = low, high, torch.full_like(low, torch.inf)

    def consider(new_low: Tensor, new_high: Tensor) -> None:
        nonlocal best_low, best_high, least
        error = _squared_error(values, costs, *_scales_of_range(new_low, new_high, bits, symmetric, dtype), bits)
        better = error < least
        least = torch.where(better, error, least)
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)

    for factor in SHRINK_FACTORS:
        consider(low * factor, high * factor)
    before = best_low
    for nudge in NUDGES:
        nudged = (before * nudge).maximum(low)
        consider(nudged, -nudged if symmetric else best_high)
    before = best_high
    for nudge in () if symmetric else NUDGES:
        consider(best_low, (before * nudge).minimum(high))
    return best_low, best_high


def _scales_of_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None when symmetric) that spread the levels over low..high; rounded to `dtype`."""
    scale = ((high - low) / (2**bits - 1)).to(dtype).float()
    # A range so small that its step underflows is one of zeros, for which any step will do.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    return scale, None if symmetric else torch.round(-low / scale)


def _squared_error(values: Tensor, costs: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    low, high = AffineGrid(scale, zero_point, bits, -1).centred_range()
    rounded = torch.round(values / scale[..., None]).clamp_(low[..., None], high[..., None])
    return rounded.mul_(scale[..., None]).sub_(values).square_().mul_(costs).sum(-1)


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

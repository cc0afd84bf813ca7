"""Fit the scale and zero point of uniform grids to a weight matrix.

Over the weights w that share a scale (zero always inside their range, so that it is a grid point):

    symmetric    s = 2 max|w| / (2^b - 1),             codes clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max w - min w) / (2^b - 1),      codes clamp(round(w / s) + z, 0, 2^b - 1),  z = round(-min w / s)

The symmetric scale is that of the GPTQ authors (arXiv 2210.17323): it spreads all 2^b levels over [-max|w|, max|w|], so
its step is smaller than max|w| / (2^(b-1) - 1), at the price that +max|w| is half a step outside the last level.

A search clips a few weights to bring the levels of all others closer. It keeps, for each scale, the levels with the
least sum of a_i (w_i - q_i)^2: first both ends are shrunk by one of SHRINK_FACTORS; asymmetric levels then move by one,
twice, with the scale times one of MOVED_FACTORS; last the scale takes one of FINE_FACTORS. `mse` counts all weights
alike; `hessian` takes for a_i what the caller says an error of the weight costs in the layer's output.
"""

import dataclasses
import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.weights import AffineWeight, code_dtype, code_range, group_columns

ScaleSearch = Literal["minmax", "mse", "hessian"]

SHRINK_FACTORS = tuple(0.87**step for step in range(12))
MOVED_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.2)
FINE_FACTORS = (0.925, 0.95, 0.975, 1.025, 1.05, 1.075)

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
        codes = _clamped(torch.round(grouped / self.scale[..., None]), low, high)
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
    costs = torch.ones(1, 1, 1, device=weight.device)
    if search == "hessian" and importance is not None:
        costs = _grouped(importance.expand_as(weight) if group_size == 0 else importance, group_size)
    costs = costs.expand(len(grouped), -1, -1)
    rows = max(1, WEIGHTS_AT_ONCE // grouped[0].numel())
    parts = zip(grouped.split(rows), costs.split(rows), strict=True)
    fitted = [_fit_levels(values, cost, bits, symmetric, search, weight.dtype) for values, cost in parts]
    scale, zero = (torch.cat(tensors) for tensors in zip(*fitted, strict=True))
    return AffineGrid(scale, None if symmetric else zero, bits, group_size)


def _fit_levels(
    values: Tensor, costs: Tensor, bits: int, symmetric: bool, search: ScaleSearch, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(scale, zero), both [...], of the values [..., n] that share them; their levels are (0..2^b - 1 - zero) scale."""
    top = 2**bits - 1
    low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high

    def spread(factor: float) -> tuple[Tensor, Tensor]:
        scale = _storable((high * factor - low * factor) / top, dtype)
        return scale, torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(low * -factor / scale)

    scale, zero = spread(1.0)
    if search == "minmax":
        return scale, zero
    least = torch.full_like(low, torch.inf)

    def consider(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal scale, zero, least
        rounded = _clamped((values / new_scale[..., None]).round_(), -new_zero, top - new_zero)
        missed = torch.addcmul(values, rounded, new_scale[..., None], value=-1, out=rounded)
        error = missed.square_().mul_(costs).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)

    for factor in SHRINK_FACTORS:
        consider(*spread(factor))
    moves = () if symmetric else (-1, 1)
    for shifts, factors in ((moves, MOVED_FACTORS), (moves, MOVED_FACTORS), ((0,), FINE_FACTORS)):
        old_scale, old_zero = scale, zero
        for shift, factor in itertools.product(shifts, factors):
            consider(_storable(old_scale * factor, dtype), (old_zero + shift).clamp(0, top))
    return scale, zero


def _clamped(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`codes` [..., n], changed in place, no less than `low` and no more than `high`, both [...]."""
    # Six times as fast as clamp_, which takes bounds that n numbers share one by one.
    torch.maximum(codes, low[..., None], out=codes)
    return torch.minimum(codes, high[..., None], out=codes)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as `dtype` holds it. One that underflows is that of zeros, for which any step will do."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded > torch.finfo(torch.float32).tiny, rounded, 1.0)


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

"""From observed values to a scale and a zero point.

    asymmetric   s = (hi - lo) / (2^b - 1),  z = round(-lo / s),  codes in [0, 2^b - 1]
    symmetric    s = max|x| / (2^(b-1) - 1), z = 0,               codes in [-2^(b-1), 2^(b-1) - 1]

[lo, hi] always holds 0, so that zero (padding, ReLU) is exact. It is the observed range (minmax), the range without the
outermost share of the values (percentile), or the shrunken or widened range whose rounding and clipping error, summed
over the histogram, is smallest (mse). Widening pays for values on a lattice, such as grey levels: k steps of the range
fall on them exactly for the right k.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Method = Literal["minmax", "percentile", "mse"]

BINS = 2048
EQUAL = 1e-9  # shares closer than this are one: they are sums of counts
STEP = 0.01
SHARES = tuple(1.1 - STEP * step for step in range(81))  # candidate shares of the observed range


@dataclasses.dataclass(frozen=True)
class QuantRange:
    """How a tensor is quantized: real = (code - zero_point) scale, codes in [quant_min, quant_max]."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int


@dataclasses.dataclass
class Observer:
    """Extremes of a tensor, then its histogram between them: two visits to the same data."""

    low: float = float("inf")
    high: float = float("-inf")
    counts: Tensor | None = None

    @property
    def has_counts(self) -> bool:
        """True when something was counted that is worth anything."""
        return self.counts is not None and bool(self.counts.any())

    def see(self, value: Tensor) -> None:
        """First visit: widen the extremes."""
        low, high = torch.aminmax(value)
        # Not Python's min and max: those lose a NaN.
        self.low = float(np.minimum(self.low, low.item()))
        self.high = float(np.maximum(self.high, high.item()))

    def count(self, value: Tensor, costs: Tensor | None = None) -> None:
        """Second visit: count values into equal bins between the extremes, each for one or, broadcast, its cost."""
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        if self.high <= self.low:
            return
        if costs is None:
            self.counts += torch.histc(value.float(), BINS, self.low, self.high).double()
        else:
            bins = ((value - self.low) * (BINS / (self.high - self.low))).long().clamp_(0, BINS - 1)
            self.counts += torch.bincount(bins.flatten(), costs.expand_as(value).flatten().double(), minlength=BINS)


def choose_range(
    seen: Observer, bits: int, symmetric: bool, method: Method, percentile: float, ceiling: float = math.inf
) -> QuantRange:
    """The range of `bits` bits for what an observer saw; `percentile` is the share of values kept, in percent.

    `ceiling` is what the values cannot pass (6 behind a ReLU6): the range does not either, so that a quantizer makes
    the cap in front of it redundant.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    counts = seen.counts
    if method == "minmax" or counts is None or high == low:
        return as_range(low, high, bits, symmetric)
    width = (seen.high - seen.low) / BINS
    if method == "percentile":
        cut = (1 - percentile / 100) / (2 if seen.low < 0 < seen.high else 1)
        share = (counts.cumsum(0) / counts.sum()).numpy()
        if low < 0:
            low = min(seen.low + width * int(np.searchsorted(share, cut + EQUAL)), 0.0)
        if high > 0:
            high = max(seen.low + width * (int(np.searchsorted(share, 1 - cut - EQUAL)) + 1), 0.0)
        return as_range(low, high, bits, symmetric)
    centers = seen.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width

    def error(candidate: QuantRange) -> float:
        return expected_error(candidate, centers, counts)

    def scaled(share: float) -> QuantRange:
        return as_range(low * share, high * share, bits, symmetric)

    def fits(candidate: QuantRange) -> bool:
        return (candidate.quant_max - candidate.zero_point) * candidate.scale <= ceiling * (1 + EQUAL)

    best = min((share for share in SHARES if fits(scaled(share))), key=lambda share: error(scaled(share)))
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    whole = range(math.ceil(steps / (best + 2 * STEP)), math.floor(steps / (best - 2 * STEP)) + 1)
    candidates = [scaled(best), *(scaled(steps / k) for k in whole)]  # k: the observed range is k steps
    if not symmetric and low < 0 < high:
        # The two ends are searched one after the other: a heavy tail on one side should not cost the other.
        candidates += [as_range(low * share, high, bits, symmetric) for share in SHARES]
        candidates += [as_range(low, high * share, bits, symmetric) for share in SHARES]
    return min(filter(fits, candidates), key=error)


def as_range(low: float, high: float, bits: int, symmetric: bool) -> QuantRange:
    """The range that covers [low, high], which holds 0."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = max(-low, high) / top
        return QuantRange(scale or 1.0, 0, -top - 1, top)
    top = 2**bits - 1
    scale = (high - low) / top
    return QuantRange(scale or 1.0, round(-low / scale) if scale else 0, 0, top)


def expected_error(candidate: QuantRange, centers: Tensor, counts: Tensor) -> float:
    """Sum of squared quantization errors over the histogram."""
    codes = torch.round(centers / candidate.scale) + candidate.zero_point
    value = (codes.clamp(candidate.quant_min, candidate.quant_max) - candidate.zero_point) * candidate.scale
    return float(((value - centers).square() * counts).sum())

"""Levels for groups of weights: scale s and float zero point z with the least lp error, by half-quadratic steps.

Each row w of `values` [groups, n] gets the levels (q - z) s, q = 0..2^bits - 1, that minimize over s, z and q

    sum_i |w_i - (q_i - z) s|^p,    0 < p <= 2.

Half-quadratic minimization (Geman and Reynolds, 1992) writes the error as the least, over weights a, of squared errors
that count a_i (and a term in a alone), so that three steps, each with its best value in closed form, take turns and
none raises the error; with b = -z s and r_i = w_i - (q_i s + b):

    codes      q_i = round((w_i - b) / s), clamped
    weights    a_i = (r_i^2 + (EPSILON s)^2)^((p - 2) / 2);    p = 2: all alike
    levels     (s, b) = the line through the points (q_i, w_i) by least squares that count a_i

Badri and Shaji (HQQ, 2023) split the error additively instead, with a shrinkage of the residuals in absolute units, and
keep the scale of the range. Here everything is in units of s, and s takes part.

The steps end in the nearest valley, so they start from several ranges: both ends of the group's range drawn in towards
its middle, each by every one of a few factors; FIRST_ROUNDS from each, LAST_ROUNDS from the best.
"""

import itertools

import torch
from torch import Tensor

EPSILON = 0.01
"""Residuals below this fraction of a step count alike, where p < 2."""

STARTS = (0.0, 1.0, 2.0, 3.5)
STEPS = {1: 0.15, 2: 0.15, 3: 0.1, 4: 0.08}
"""An end is drawn in by the fractions STARTS * STEPS[bits] of the half range; wide codes have little to gain."""
WIDE_STEP = 0.02

FIRST_ROUNDS, LAST_ROUNDS = 1, 8

WEIGHTS_AT_ONCE = 1 << 17
"""Weights worked on together, at least one group's: keeps what is looked at time and again in the cache."""


def fit_levels(values: Tensor, bits: int, lp_norm: float, bounded: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point), [groups, 1] each, float32, for `values` [groups, n], which are finite.

    A group of one value v gets that value itself: as (1 - 0) v, or (0 - 1) |v| below zero. Scales are positive, but
    for a group of zeros, which gets 0. With `bounded`, zero points lie within one width of the levels from the codes.
    """
    rows = max(1, WEIGHTS_AT_ONCE // values.shape[1])
    fitted = [_Fit(part.float().contiguous(), bits, lp_norm).run(bounded) for part in values.split(rows)]
    scale, zero = (torch.cat(tensors) for tensors in zip(*fitted, strict=True))
    return scale, zero


class _Fit:
    """Groups `values` [groups, n] under fit; the best levels so far are scale * q + base, [groups, 1] each."""

    def __init__(self, values: Tensor, bits: int, lp_norm: float) -> None:
        self.values, self.bits, self.lp_norm = values, bits, lp_norm
        self.top = 2**bits - 1
        self.low, self.high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        self.error = torch.full_like(self.low, torch.inf)
        self.scale, self.base = torch.ones_like(self.low), torch.zeros_like(self.low)

    def run(self, bounded: bool) -> tuple[Tensor, Tensor]:
        """The best scale and zero point found."""
        low, high, half = self.low, self.high, (self.high - self.low) / 2
        factors = [start * STEPS.get(self.bits, WIDE_STEP) for start in STARTS]
        for lower, upper in itertools.product(factors, factors):
            self._descend((high - low - half * (lower + upper)) / self.top, low + half * lower, FIRST_ROUNDS)
        self._descend(self.scale, self.base, LAST_ROUNDS)
        constant = (high - low) <= torch.finfo(torch.float32).tiny * self.top
        scale = torch.where(constant, high.abs(), self.scale)
        zero = torch.where(constant, (high < 0).float(), -self.base / self.scale)
        if bounded:
            inside = zero.clamp(-self.top, 2 * self.top)
            # The levels farthest from zero are then 2 top steps away.
            scale = torch.where(inside == zero, scale, torch.maximum(low.abs(), high.abs()) / (2 * self.top))
            zero = inside
        return scale, zero

    def _descend(self, scale: Tensor, base: Tensor, rounds: int) -> None:
        """So many rounds of steps from these levels; the best of all levels seen is kept."""
        scale = torch.where(scale > 0, scale, 1.0)
        for step in range(rounds + 1):
            codes = ((self.values - base) / scale).round_().clamp_(0, self.top)
            residuals = torch.addcmul(base - self.values, codes, scale)
            squares = residuals.square_()
            error = (squares if self.lp_norm == 2 else squares ** (self.lp_norm / 2)).sum(1, keepdim=True)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.scale, self.base = torch.where(better, scale, self.scale), torch.where(better, base, self.base)
            if step < rounds:
                scale, base = self._line(codes, squares, scale)

    def _line(self, codes: Tensor, squares: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, intercept) of the values over their codes; the slope stays where all codes are alike."""
        values, count = self.values, float(codes.shape[1])
        first, second = codes, values
        total: Tensor | float = count
        if self.lp_norm != 2:
            counts = (squares + (EPSILON * scale).square()) ** (self.lp_norm / 2 - 1)
            counts /= counts.amax(1, keepdim=True)
            first, second, total = counts * codes, counts * values, counts.sum(1, keepdim=True)
        sum_codes, sum_values = first.sum(1, keepdim=True), second.sum(1, keepdim=True)
        spread = total * (first * codes).sum(1, keepdim=True) - sum_codes.square()
        slope = (total * (first * values).sum(1, keepdim=True) - sum_codes * sum_values) / spread
        slope = torch.where((spread > 0) & (slope > 0) & slope.isfinite(), slope, scale)
        return slope, (sum_values - slope * sum_codes) / total

"""Levels for groups of weights: scale s and float zero point z with the least lp error, by half-quadratic steps.

Each row w of `values` [groups, n] gets the levels (q - z) s, q = 0..2^bits - 1, that minimize over s, z and q

    sum_i |w_i - (q_i - z) s|^p,    0 < p <= 4.

Half-quadratic minimization (Geman and Reynolds, 1992) replaces |r|^p by a r^2, with weights a from the residuals of the
step before, so that three steps, each with its best value in closed form, take turns; with b = -z s and
r_i = w_i - (q_i s + b):

    codes      q_i = round((w_i - b) / s), clamped
    weights    a_i = (|r_i| + EPSILON s)^(p - 2);    p = 2: all alike
    levels     (s, b) = the line through the points (q_i, w_i) by least squares that count a_i

Up to p = 2 no round raises the error (but for EPSILON); above, one may, and the best levels seen are kept. Badri and
Shaji (HQQ, 2023) split the error additively instead, with a shrinkage of the residuals in absolute units, and keep the
scale of the range. Here everything is in units of the group's range, and s takes part.

The steps end in the nearest valley, so they start from several ranges: both ends of the group's range drawn in towards
its middle, each by every one of a few factors; FIRST_ROUNDS from each, LAST_ROUNDS from the best.
"""

import itertools

import torch
from torch import Tensor

EPSILON = 0.01
"""Fraction of a step: keeps a residual near zero from counting without end, where p < 2."""

STARTS = (0.0, 1.0, 2.0, 3.5)
STEPS = {1: 0.15, 2: 0.15, 3: 0.1, 4: 0.05}
"""An end is drawn in by the fractions STARTS * STEPS[bits] of the half range; wide codes have little to gain."""
WIDE_STEP = 0.02

FIRST_ROUNDS, LAST_ROUNDS = 1, 8

ROUNDING = 1e-5
"""A spread of codes below this fraction of their squares is what rounding leaves of none."""

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
    """Groups [groups, n] under fit, in units in which they reach from 0 to the largest code.

    The best levels so far are scale * q + base, [groups, 1] each.
    """

    def __init__(self, values: Tensor, bits: int, lp_norm: float) -> None:
        self.bits, self.lp_norm, self.top = bits, lp_norm, 2**bits - 1
        self.low, self.high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        unit = self.high / self.top - self.low / self.top  # the range itself may overflow
        self.constant = unit <= torch.finfo(torch.float32).tiny
        self.unit = torch.where(self.constant, 1.0, unit)
        self.values = (values - self.low) / self.unit
        self.error = torch.full_like(unit, torch.inf)
        self.scale, self.base = torch.ones_like(unit), torch.zeros_like(unit)

    def run(self, bounded: bool) -> tuple[Tensor, Tensor]:
        """The best scale and zero point found, in the weights' units."""
        factors = [start * STEPS.get(self.bits, WIDE_STEP) for start in STARTS]
        for lower, upper in itertools.product(factors, factors):
            self.descend(1 - (lower + upper) / 2, lower * self.top / 2, FIRST_ROUNDS)
        self.descend(self.scale, self.base, LAST_ROUNDS)
        scale = torch.where(self.constant, self.high.abs(), self.scale * self.unit)
        zero = -(self.base + self.low / self.unit) / self.scale
        zero = torch.where(self.constant, (self.high < 0).float(), zero)
        if bounded:
            inside = zero.clamp(-self.top, 2 * self.top)
            # The levels farthest from zero are then 2 top steps away.
            farthest = torch.maximum(self.low.abs(), self.high.abs())
            scale, zero = torch.where(inside == zero, scale, farthest / (2 * self.top)), inside
        return scale, zero

    def descend(self, scale: Tensor | float, base: Tensor | float, rounds: int) -> None:
        """So many rounds of steps from these levels; the best of all levels seen is kept."""
        scale, base = (
            level if isinstance(level, Tensor) else torch.full_like(self.unit, level) for level in (scale, base)
        )
        for step in range(rounds + 1):
            codes = ((self.values - base) / scale).round_().clamp_(0, self.top)
            residuals = torch.addcmul(base - self.values, codes, scale).abs_()
            error = residuals.pow(self.lp_norm).sum(1, keepdim=True)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.scale, self.base = torch.where(better, scale, self.scale), torch.where(better, base, self.base)
            if step < rounds:
                scale, base = self._line(codes, residuals, scale)

    def _line(self, codes: Tensor, residuals: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, intercept) of the values over their codes; the slope stays where all codes are alike."""
        counted_codes, counted_values = codes, self.values
        total = torch.full_like(scale, codes.shape[1])
        if self.lp_norm != 2:
            counts = residuals.add_(EPSILON * scale).pow_(self.lp_norm - 2)
            counted_codes, counted_values, total = counts * codes, counts * self.values, counts.sum(1, keepdim=True)
        sum_codes, sum_values = counted_codes.sum(1, keepdim=True), counted_values.sum(1, keepdim=True)
        squares = total * (counted_codes * codes).sum(1, keepdim=True)
        spread = squares - sum_codes.square()
        slope = (total * (counted_codes * self.values).sum(1, keepdim=True) - sum_codes * sum_values) / spread
        slope = torch.where((spread > ROUNDING * squares) & (slope > 0), slope, scale)
        return slope, (sum_values - slope * sum_codes) / total

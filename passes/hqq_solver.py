"""Levels for groups of weights: scale s and float zero point z with the least lp error, by half-quadratic steps.

Each row w of `values` [groups, n] gets the levels (q - z) s, q = 0..2^bits - 1, that minimize over s, z and q

    sum_i |w_i - (q_i - z) s|^p,    0 < p <= 4.

Half-quadratic minimization (Geman and Reynolds, 1992) replaces |r|^p by a r^2, with weights a from the residuals of the
step before, so that three steps, each with its best value in closed form, take turns; with b = -z s and
r_i = (w_i - b) / s - q_i, residuals in steps of the levels:

    codes      q_i = round((w_i - b) / s), clamped
    weights    a_i = (|r_i| + EPSILON)^(p - 2);    p = 2: all alike
    levels     (s, b) = the line through the points (q_i, w_i) by least squares that count a_i

Up to p = 2 no round raises the error (but for EPSILON); above, one may, and the best levels seen are kept. Badri and
Shaji (HQQ, 2023) split the error additively instead, with a shrinkage of the residuals in absolute units, and keep the
scale of the range. Here everything is in units of the group's range, and s takes part.

The steps end in the nearest valley, so they start from several ranges: both ends of the group's range drawn in towards
its middle, each by every one of a few factors. FIRST_ROUNDS from each of the BEST_STARTS of them with the least error,
LAST_ROUNDS from the best levels seen.

Levels that are stored in codes of their own lie on a coarser grid, where the nearest to s and z are not the best:
choose_stored tries their neighbours.
"""

import dataclasses
import itertools

import torch
from torch import Tensor

EPSILON = 0.01
"""Fraction of a step: keeps a residual near zero from counting without end, where p < 2."""

STARTS = {
    1: (0.0, 0.5),
    2: (0.0, 0.15, 0.3, 0.525),
    3: (0.0, 0.1, 0.2, 0.35),
    4: (0.0, 0.05, 0.1, 0.175),
    8: (0.0,),
}
"""An end is drawn in by these fractions of the half range, for every width; wide codes have nothing to gain."""

BEST_STARTS = 3
FIRST_ROUNDS, LAST_ROUNDS = 2, 6

ROUNDING = 1e-5
"""A spread of codes below this fraction of their squares is what rounding leaves of none."""

WEIGHTS_AT_ONCE = 1 << 18
"""Weights worked on together, at least one group's: keeps what is looked at time and again in the cache."""

REACH = {1: 0, 2: 1, 3: 1, 4: 1, 8: 2}
"""How many stored scales and zero points to either side are tried: theirs are fine to 1 bit, coarse to 8 bits."""


def fit_levels(values: Tensor, bits: int, lp_norm: float, bounded: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point), [groups, 1] each, float32, for `values` [groups, n], which are finite.

    A group of one value v gets that value itself: as (1 - 0) v, or (0 - 1) |v| below zero. Scales are positive, but
    for a group of zeros, which gets 0. With `bounded`, zero points lie within one width of the levels from the codes.
    """
    fitted = [_Fit(part.float().contiguous(), bits, lp_norm).run(bounded) for part in values.split(_rows(values))]
    scale, zero = (torch.cat(tensors) for tensors in zip(*fitted, strict=True))
    return scale, zero


@dataclasses.dataclass(frozen=True)
class StoredGrid:
    """The numbers (code - zero) * scale, code = 0..top, that a group's scale or zero point is stored as.

    scale and zero [groups, 1], float32.
    """

    scale: Tensor
    zero: Tensor
    top: int

    def value(self, codes: Tensor) -> Tensor:
        """The numbers of these codes [groups, 1]."""
        return (codes - self.zero) * self.scale

    def nearest(self, values: Tensor) -> Tensor:
        """The codes [groups, 1], float32, of the numbers nearest to these."""
        return (values / torch.where(self.scale == 0, 1, self.scale) + self.zero).round_().clamp_(0, self.top)

    def rows(self, part: slice) -> "StoredGrid":
        """The grid of some groups."""
        return StoredGrid(self.scale[part], self.zero[part], self.top)


def choose_stored(
    values: Tensor, bits: int, lp_norm: float, scale: Tensor, zero: Tensor, scales: StoredGrid, zeros: StoredGrid
) -> tuple[Tensor, Tensor]:
    """(scale codes, zero point codes), [groups, 1] each, uint8, for levels found as `scale` > 0 and `zero` [groups, 1].

    Of the stored scales within REACH of the nearest, each with the stored zero points within REACH of the one that
    keeps the middle of the levels in its place, those with the least lp error of `values` [groups, n]. It is at most
    that of the nearest scale and zero point.
    """
    chosen = []
    for start in range(0, len(values), _rows(values)):
        part = slice(start, start + _rows(values))
        chosen.append(
            _choose(values[part].float(), bits, lp_norm, scale[part], zero[part], scales.rows(part), zeros.rows(part))
        )
    scale_codes, zero_codes = (torch.cat(codes).to(torch.uint8) for codes in zip(*chosen, strict=True))
    return scale_codes, zero_codes


def _choose(
    values: Tensor, bits: int, lp_norm: float, scale: Tensor, zero: Tensor, scales: StoredGrid, zeros: StoredGrid
) -> tuple[Tensor, Tensor]:
    """choose_stored for as many groups as the cache holds."""
    top, reach = 2**bits - 1, REACH[bits]
    scale_codes, zero_codes = scales.nearest(scale), zeros.nearest(zero)
    nearest, tried = scale_codes, [(scale_codes, zero_codes)]
    for move in range(-reach, reach + 1):
        moved = (nearest + move).clamp_(0, scales.top)
        centred = zeros.nearest(top / 2 - (top / 2 - zero) * scale / scales.value(moved))
        tried += [(moved, (centred + shift).clamp_(0, zeros.top)) for shift in range(-reach, reach + 1)]
    least = torch.full_like(scale, torch.inf)
    for codes in tried:
        step = scales.value(codes[0])
        position = (values * (1 / step)).add_(zeros.value(codes[1]))
        residuals = position.sub_(position.round().clamp_(0, top)).abs_()
        # in units of the step that was found, whose power neither overflows nor vanishes
        error = residuals.pow_(lp_norm).sum(1, keepdim=True) * (step / scale) ** lp_norm
        better = (error < least) & (step > 0)
        least = torch.where(better, error, least)
        scale_codes = torch.where(better, codes[0], scale_codes)
        zero_codes = torch.where(better, codes[1], zero_codes)
    return scale_codes, zero_codes


def _rows(values: Tensor) -> int:
    """How many groups are worked on together."""
    return max(1, WEIGHTS_AT_ONCE // values.shape[1])


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
        for scale, base in self._starts():
            self.descend(scale, base, FIRST_ROUNDS)
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

    def descend(self, scale: Tensor, base: Tensor, rounds: int) -> None:
        """So many rounds of steps from these levels; the best of all levels seen is kept."""
        for step in range(rounds + 1):
            codes, residuals, error = self._look(scale, base)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.scale, self.base = torch.where(better, scale, self.scale), torch.where(better, base, self.base)
            if step < rounds:
                scale, base = self._line(codes, residuals, scale, base)

    def _starts(self) -> list[tuple[Tensor, Tensor]]:
        """(scale, base) of the starts with the least error, each group's own."""
        levels, errors = [], []
        for lower, upper in itertools.product(STARTS[self.bits], repeat=2):
            range_levels = 1 - (lower + upper) / 2, lower * self.top / 2
            levels.append([torch.full_like(self.unit, level) for level in range_levels])
            errors.append(self._look(*levels[-1])[2])
        best = torch.cat(errors, dim=1).topk(min(BEST_STARTS, len(errors)), largest=False).indices
        scales, bases = (torch.cat(kind, dim=1).gather(1, best).split(1, dim=1) for kind in zip(*levels, strict=True))
        return list(zip(scales, bases, strict=True))

    def _look(self, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, residuals in steps, lp error [groups, 1]) of these levels."""
        inverse = 1 / scale
        residuals = (self.values * inverse).sub_(base * inverse)
        codes = residuals.round().clamp_(0, self.top)
        error = residuals.sub_(codes).abs().pow_(self.lp_norm).sum(1, keepdim=True)
        return codes, residuals, error * scale**self.lp_norm

    def _line(self, codes: Tensor, residuals: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, intercept) of the values over their codes; the slope stays where all codes are alike.

        The line through the residuals tells by how much they change.
        """
        counted_codes, counted_residuals, total = codes, residuals, torch.full_like(scale, codes.shape[1])
        if self.lp_norm != 2:
            counts = residuals.abs().add_(EPSILON).pow_(self.lp_norm - 2)
            counted_codes, counted_residuals, total = counts * codes, counts * residuals, counts.sum(1, keepdim=True)
        sum_codes, sum_residuals = counted_codes.sum(1, keepdim=True), counted_residuals.sum(1, keepdim=True)
        squares = total * (counted_codes * codes).sum(1, keepdim=True)
        spread = squares - sum_codes.square()
        products = total * (counted_codes * residuals).sum(1, keepdim=True)
        change = (products - sum_codes * sum_residuals) / spread
        change = torch.where((spread > ROUNDING * squares) & (change > -1), change, 0)
        return scale * (1 + change), base + scale * (sum_residuals - change * sum_codes) / total

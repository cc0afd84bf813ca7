"""Levels of groups: the least error of tiny groups, no step that raises it, and groups that have nothing to fit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.hqq_solver import EPSILON, STARTS, StoredGrid, _Fit, choose_stored, fit_levels


def _values(groups: int, count: int, seed: int = 0) -> Tensor:
    """Heavy-tailed groups: a normal over the root mean square of three others."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, groups, count, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _levels(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Every value's nearest level."""
    codes = (values / torch.where(scale > 0, scale, 1) + zero).round().clamp(0, 2**bits - 1)
    return (codes - zero) * scale


def _errors(values: Tensor, bits: int, p: float = 2.0) -> Tensor:
    """The lp error of each group."""
    scale, zero = fit_levels(values, bits, p, bounded=False)
    return (_levels(values, scale, zero, bits) - values).abs().pow(p).sum(1)


def _optimum(values: Tensor, bits: int) -> Tensor:
    """The least squared error of each group: the best of all monotone codes, each with its line."""
    count = values.shape[1]
    ordered = values.sort(dim=1).values.double()
    best = torch.full((len(values),), torch.inf, dtype=torch.float64)
    for codes in itertools.combinations_with_replacement(range(2**bits), count):
        q = torch.tensor(codes, dtype=torch.float64)
        centred, spread = q - q.mean(), (q - q.mean()).square().sum()
        slope = (ordered * centred).sum(1, keepdim=True) / spread if spread > 0 else torch.zeros(len(values), 1)
        line = ordered.mean(1, keepdim=True) + slope * centred
        best = torch.minimum(best, (ordered - line).square().sum(1))
    return best


@pytest.mark.parametrize(("bits", "count"), [(1, 6), (2, 6), (2, 8)])
def test_near_the_optimum_of_tiny_groups(bits: int, count: int) -> None:
    values = _values(200, count)
    found, best = _errors(values, bits).double(), _optimum(values, bits)
    assert bool((found >= best * (1 - 1e-4) - 1e-9).all())  # float32 against float64
    # a descent from sixteen ranges: it finds most optima, and loses little on the rest
    assert float(found.sum()) <= 1.1 * float(best.sum())
    assert float((found <= best * 1.001).double().mean()) >= 0.6


@pytest.mark.parametrize("p", [3.0, 2.0, 1.0, 0.7])
def test_better_in_its_own_norm_than_the_range(p: float) -> None:
    values = _values(300, 64)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = (high - low) / 7
    by_range = (_levels(values, scale, -low / scale, 3) - values).abs().pow(p).sum(1)
    errors = _errors(values, 3, p)
    # the range is where the descent starts, and is kept if nothing is better; float32 sums
    assert bool((errors <= by_range * (1 + 1e-4)).all())
    assert float(errors.sum()) < 0.9 * float(by_range.sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.sampled_from((1, 2, 3, 4, 8)), st.sampled_from((0.7, 2.0, 3.0)))
def test_never_worse_than_any_of_the_starts(seed: int, bits: int, p: float) -> None:
    fit = _Fit(_values(20, 24, seed), bits, p)
    fit.run(bounded=False)
    for lower, upper in itertools.product(STARTS[bits], repeat=2):
        scale, base = 1 - (lower + upper) / 2, lower * fit.top / 2
        levels = ((fit.values - base) / scale).round().clamp(0, fit.top) * scale + base
        error = (levels - fit.values).abs().pow(p).sum(1, keepdim=True)
        # float32, of values up to fit.top: a residual is off by some fit.top * 2^-23 of at least a tenth in the mean
        assert bool((fit.error <= error * (1 + 1e-3)).all())


@pytest.mark.parametrize("p", [4.0, 3.0, 1.5, 1.0, 0.7])
def test_the_norm_is_what_is_minimized(p: float) -> None:
    values = _values(300, 64)
    scale, zero = fit_levels(values, 3, 2.0, bounded=False)
    by_squares = (_levels(values, scale, zero, 3) - values).abs().pow(p).sum()
    assert float(_errors(values, 3, p).sum()) < float(by_squares)


def _step(fit: _Fit, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, residuals in steps, their squared error) of these levels."""
    codes = ((fit.values - base) / scale).round().clamp(0, fit.top)
    residuals = (fit.values - base) / scale - codes
    return codes, residuals, (residuals * scale).square().sum(1, keepdim=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.sampled_from((1, 2, 3, 4, 8)), st.floats(1e-30, 1e30))
def test_no_round_raises_the_squared_error(seed: int, bits: int, unit: float) -> None:
    fit = _Fit(_values(20, 16, seed) * unit, bits, 2.0)
    scale, base = torch.ones_like(fit.scale), torch.zeros_like(fit.base)
    before = torch.full_like(scale, torch.inf)
    for _ in range(6):
        codes, residuals, error = _step(fit, scale, base)
        # values reach from 0 to fit.top: their squares are rounded to float32
        assert bool((error <= before + 1e-5 * fit.top**2).all())
        scale, base = fit._line(codes, residuals, scale, base)
        before = error


@pytest.mark.parametrize("p", [3.0, 2.0, 1.0, 0.7])
def test_the_line_leaves_nothing_to_gain(p: float) -> None:
    fit = _Fit(_values(50, 32), 3, p)
    scale, base = torch.full_like(fit.scale, 0.9), torch.full_like(fit.base, 0.3)
    codes, residuals, _ = _step(fit, scale, base)
    counts = (residuals.abs() + EPSILON) ** (p - 2)
    slope, intercept = fit._line(codes, residuals, scale, base)
    left = fit.values - slope * codes - intercept
    assert bool((slope > 0).all())
    # the normal equations, in float32 sums of 32 products of numbers up to 7 * 7
    size = (counts * codes.square()).sum(1).clamp_min(1)
    assert float(((counts * left).sum(1) / size).abs().max()) < 1e-4
    assert float(((counts * left * codes).sum(1) / size).abs().max()) < 1e-4


def test_units_do_not_matter() -> None:
    values = _values(50, 32)
    for p in (3.0, 2.0, 0.7):
        scale, zero = fit_levels(values, 3, p, bounded=False)
        for unit in (2.0**-60, 2.0**40):
            other_scale, other_zero = fit_levels(values * unit, 3, p, bounded=False)
            # powers of two change no rounding but the power's: pow is not exact
            torch.testing.assert_close(other_scale / unit, scale, rtol=1e-4 if p < 2 else 0, atol=0)
            torch.testing.assert_close(other_zero, zero, rtol=1e-3 if p < 2 else 0, atol=1e-3 if p < 2 else 0)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("bounded", [True, False])
def test_constant_groups_are_met(bits: int, bounded: bool) -> None:
    values = torch.tensor([0.0, 0.3, -0.7, 1e-30, -1e30])[:, None].expand(-1, 6)
    scale, zero = fit_levels(values, bits, 2.0, bounded)
    assert torch.equal(_levels(values, scale, zero, bits), values)
    assert scale[:, 0].tolist() == values.abs()[:, 0].tolist()


def test_bounded_zero_points() -> None:
    values = _values(40, 32)
    values[:10] += 100
    values[10:20] -= 1000
    scale, zero = fit_levels(values, 3, 2.0, bounded=True)
    assert bool(((zero >= -7) & (zero <= 14)).all())
    free_scale, free_zero = fit_levels(values, 3, 2.0, bounded=False)
    assert bool((free_zero[10:20] > 14).all())
    assert torch.equal(scale[20:], free_scale[20:])
    # the levels reach from half of the farthest value to it, in seven steps
    errors = (_levels(values, scale, zero, 3) - values).abs().amax(1)
    assert bool((errors[:20] <= values.abs().amax(1)[:20] / 14 * 0.5 * (1 + 1e-5)).all())


# ---- levels that are stored in codes --------------------------------------------------------------------------------


def _grid(values: Tensor, bits: int) -> StoredGrid:
    """2^bits numbers from the least to the greatest of the values [groups, 1]."""
    step = ((values.max() - values.min()) / (2**bits - 1)).expand_as(values)
    return StoredGrid(step, -values.min() / step, 2**bits - 1)


def _stored_error(values: Tensor, bits: int, p: float, scale: Tensor, zero: Tensor) -> Tensor:
    return (_levels(values, scale, zero, bits) - values).abs().pow(p).sum(1, keepdim=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**16), st.sampled_from((1, 2, 3, 4, 8)), st.sampled_from((0.7, 2.0, 3.0)), st.floats(1e-20, 1e20)
)
def test_stored_levels_are_never_worse_than_the_nearest(seed: int, bits: int, p: float, unit: float) -> None:
    values = _values(40, 24, seed)
    scale, zero = fit_levels(values * unit, bits, p, bounded=True)
    scales, zeros = _grid(scale, 6), _grid(zero, 6)
    scale_codes, zero_codes = choose_stored(values * unit, bits, p, scale, zero, scales, zeros)
    assert scale_codes.dtype == zero_codes.dtype == torch.uint8
    assert max(int(scale_codes.max()), int(zero_codes.max())) <= 63
    nearest = scales.value(scales.nearest(scale)), zeros.value(zeros.nearest(zero))
    chosen = scales.value(scale_codes), zeros.value(zero_codes)
    assert bool((chosen[0] > 0).all())
    before, after = (_stored_error(values, bits, p, scale / unit, zero) for scale, zero in (nearest, chosen))
    assert bool((after <= before * (1 + 1e-3)).all())  # float32, as above


def test_stored_levels_gain_a_tenth_at_8_bits() -> None:
    """Their steps are coarse there: a stored scale is off by more than one of 255 parts."""
    values = _values(300, 64)
    scale, zero = fit_levels(values, 8, 2.0, bounded=True)
    scales, zeros = _grid(scale, 8), _grid(zero, 8)
    codes = choose_stored(values, 8, 2.0, scale, zero, scales, zeros)
    nearest = scales.value(scales.nearest(scale)), zeros.value(zeros.nearest(zero))
    chosen = scales.value(codes[0]), zeros.value(codes[1])
    before, after = (float(_stored_error(values, 8, 2.0, *levels).sum()) for levels in (nearest, chosen))
    assert after < 0.9 * before


def test_groups_chosen_in_parts_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values(50, 16)

    def found() -> tuple[Tensor, ...]:
        scale, zero = fit_levels(values, 3, 2.0, bounded=True)
        return scale, zero, *choose_stored(values, 3, 2.0, scale, zero, _grid(scale, 5), _grid(zero, 5))

    at_once = found()
    monkeypatch.setattr("passes.hqq_solver.WEIGHTS_AT_ONCE", 7 * 16)
    assert all(torch.equal(*pair) for pair in zip(found(), at_once, strict=True))

"""Grids: every weight within half a step of a level, nothing better by shrinking, no scale that divides by zero."""

import pytest
import torch
from torch import Tensor

import passes.affine_grid
from passes.affine_grid import SHRINK_FACTORS, ScaleSearch, fit_grid
from passes.weights import code_range
from tests.passes.nets import FLOAT32_EPS

WIDTHS = [2, 3, 4, 8]


def _weight(rows: int = 5, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(4 * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8, 7])
@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_is_to_the_nearest_of_all_levels(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _weight()
    quantized = fit_grid(weight, bits, group_size, symmetric).round(weight)
    low, high = code_range(bits, symmetric)
    assert int(quantized.codes.min()) >= low
    assert int(quantized.codes.max()) <= high
    error = (quantized.dequantize() - weight).abs()
    width = weight.shape[1] if group_size <= 0 else group_size
    for i in range(weight.shape[1]):
        scale = quantized.scale[:, i // width, None]  # [out or 1, 1]
        zero = 0 if quantized.zero_point is None else quantized.zero_point[:, i // width, None]
        levels = (torch.arange(low, high + 1) - zero) * scale  # [out or 1, levels]
        nearest = (levels - weight[:, i, None]).abs().amin(1)
        # A tie, as at the end of a symmetric range, goes either way by the rounding of numbers near the last level.
        assert bool((error[:, i] <= nearest + 2**bits * FLOAT32_EPS * scale[:, 0]).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_scale_spreads_all_levels_over_the_range(bits: int) -> None:
    weight = _weight()
    grid = fit_grid(weight, bits, -1, symmetric=True)
    assert grid.zero_point is None
    assert torch.equal(grid.scale, 2 * weight.abs().amax(1, keepdim=True) / (2**bits - 1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_levels_reach_both_ends_and_hold_zero(bits: int) -> None:
    weight = _weight() + 1.5
    quantized = fit_grid(weight, bits, -1, symmetric=False).round(weight)
    error = (quantized.dequantize() - weight).abs()
    # Rounding the zero point moves the levels by up to half a step, rounding to a level by another half.
    assert bool((error <= quantized.scale * (1 + 1e-5)).all())
    assert quantized.zero_point is not None
    assert torch.equal(quantized.zero_point, quantized.zero_point.round())
    assert bool(((quantized.zero_point >= 0) & (quantized.zero_point <= 2**bits - 1)).all())


def test_shapes_by_group_size() -> None:
    weight = _weight(5, 24)
    shapes = {size: tuple(fit_grid(weight, 4, size, True).scale.shape) for size in (-1, 0, 8, 7, 24, 128)}
    assert shapes == {-1: (5, 1), 0: (1, 1), 8: (5, 3), 7: (5, 4), 24: (5, 1), 128: (5, 1)}
    assert fit_grid(weight, 4, 128, True).group_size == -1


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_fitted_by_themselves(symmetric: bool) -> None:
    weight = _weight(4, 20)
    grid = fit_grid(weight, 4, 8, symmetric)
    for group, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        alone = fit_grid(weight[:, columns], 4, -1, symmetric)
        assert torch.equal(grid.scale[:, group : group + 1], alone.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_rows_of_zeros_stay_zeros(symmetric: bool, value: float) -> None:
    weight = _weight(3, 8)
    weight[1] = value
    quantized = fit_grid(weight, 4, -1, symmetric).round(weight)
    assert torch.isfinite(quantized.dequantize()).all()
    assert torch.equal(quantized.dequantize()[1], torch.zeros(8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_mse_search_is_the_best_of_all_shrunk_ranges(group_size: int, symmetric: bool) -> None:
    weight = _weight(6, 64, seed=3)
    weight[:, 5] *= 6  # an outlier that is worth clipping

    def errors(search: ScaleSearch, shrink: float = 1.0) -> Tensor:
        # Clipping the weight before a min-max fit gives the grid of the shrunk range.
        low, high = torch.aminmax(weight) if group_size == 0 else torch.aminmax(weight, dim=1, keepdim=True)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        fitted = weight.clamp(low * shrink, high * shrink) if group_size <= 0 else weight
        grid = fit_grid(fitted, 3, group_size, symmetric, search)
        return (grid.round(weight).dequantize() - weight).square().sum(1)

    best, plain = errors("mse"), errors("minmax")
    assert float(best.sum()) < float(plain.sum())
    if group_size <= 0:
        tried = torch.stack([errors("minmax", shrink) for shrink in SHRINK_FACTORS])
        least = tried.sum(1).min() if group_size == 0 else tried.amin(0).sum()
        assert float(best.sum()) <= float(least) * (1 + 1e-5)  # float32 sums of 384 squares in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_fit_the_weights_own_type(dtype: torch.dtype) -> None:
    grid = fit_grid(_weight().to(dtype), 4, 8, symmetric=False)
    assert grid.scale.dtype is torch.float32
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
@pytest.mark.parametrize("bits", WIDTHS)
def test_hessian_search_minimizes_the_weighted_error(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _weight(6, 32, seed=3)
    weight[:, 5] *= 6
    importance = torch.exp2(3 * torch.randn(6, 32, generator=torch.Generator().manual_seed(1)))

    def errors(search: ScaleSearch) -> Tensor:
        grid = fit_grid(weight, bits, group_size, symmetric, search, importance)
        squares = importance * (grid.round(weight).dequantize() - weight).square()
        return squares.sum().view(1) if group_size == 0 else squares.sum(1)

    weighted, plain = errors("hessian"), errors("minmax")
    assert bool((weighted <= plain * (1 + 1e-5)).all())  # float32 sums of up to 192 squares in another order
    assert float(weighted.sum()) < float(plain.sum())
    assert float(weighted.sum()) < float(errors("mse").sum())


@pytest.mark.parametrize("group_size", [-1, 0, 8, 7])
def test_hessian_search_with_weights_that_count_alike_is_mse(group_size: int) -> None:
    weight = _weight(6, 32)
    expected = fit_grid(weight, 3, group_size, False, "mse")
    for importance in (None, torch.full((1, 32), 1.0), torch.full((6, 32), 1.0)):
        grid = fit_grid(weight, 3, group_size, False, "hessian", importance)
        assert torch.equal(grid.scale, expected.scale)
        assert grid.zero_point is not None
        assert expected.zero_point is not None
        assert torch.equal(grid.zero_point, expected.zero_point)


def test_asymmetric_search_clips_one_end_alone() -> None:
    # Nine weights evenly from -4 to 4 and one far out: clipping it, at almost no cost, leaves all others on levels.
    weight = torch.tensor([[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 30.0]])
    importance = torch.ones(1, 10)
    importance[0, 9] = 1e-4
    grid = fit_grid(weight, 4, -1, False, "hessian", importance)
    squares = (grid.round(weight).dequantize() - weight).square()
    # Shrunk with one factor to a step near 1 the range would end above -2; clipping -4 and -3 costs more than 2.
    assert float(squares[0, :9].sum()) < 1
    assert float(squares[0, 9]) > 100


def test_weights_searched_together_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = _weight(7, 24), torch.rand(7, 24, generator=torch.Generator().manual_seed(0))
    expected = fit_grid(weight, 3, 8, False, "hessian", importance)
    monkeypatch.setattr(passes.affine_grid, "WEIGHTS_AT_ONCE", 48)
    actual = fit_grid(weight, 3, 8, False, "hessian", importance)
    assert torch.equal(actual.scale, expected.scale)

"""From observed values to scale and zero point."""

import pytest
import torch
from torch import Tensor

from passes.ranges import BINS, Method, Observer, QuantRange, as_range, choose_range, expected_error


def observed(*values: Tensor) -> Observer:
    """Both visits to the data."""
    observer = Observer()
    for value in values:
        observer.see(value)
    for value in values:
        observer.count(value)
    return observer


def error(values: Tensor, chosen: QuantRange) -> float:
    """Mean squared error of quantizing the values themselves."""
    codes = (torch.round(values / chosen.scale) + chosen.zero_point).clamp(chosen.quant_min, chosen.quant_max)
    return float(((codes - chosen.zero_point) * chosen.scale - values).square().mean())


def heavy_tail() -> Tensor:
    """10000 standard normal values but one outlier at 20."""
    values = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    values[0] = 20.0
    return values


def test_asymmetric_ranges_hold_zero_on_the_grid() -> None:
    assert as_range(-1.0, 3.0, 8, symmetric=False) == QuantRange(4 / 255, 64, 0, 255)
    assert as_range(0.0, 2.55, 8, symmetric=False) == QuantRange(2.55 / 255, 0, 0, 255)
    assert as_range(-3.0, 0.0, 4, symmetric=False) == QuantRange(0.2, 15, 0, 15)


def test_symmetric_ranges_have_no_zero_point() -> None:
    assert as_range(-1.27, 0.5, 8, symmetric=True) == QuantRange(0.01, 0, -128, 127)
    assert as_range(0.0, 7.0, 4, symmetric=True) == QuantRange(1.0, 0, -8, 7)


def test_a_tensor_of_zeros_gets_a_usable_range() -> None:
    for symmetric in (True, False):
        for method in ("minmax", "percentile", "mse"):
            chosen = choose_range(observed(torch.zeros(5)), 8, symmetric, method, 99.9)
            assert chosen.scale == 1.0
            assert chosen.zero_point == 0


def test_minmax_covers_what_was_seen_and_zero() -> None:
    seen = observed(torch.tensor([2.0, 3.0]), torch.tensor([5.1]))
    assert (seen.low, seen.high) == (2.0, pytest.approx(5.1))
    chosen = choose_range(seen, 8, False, "minmax", 100)
    assert chosen == QuantRange(pytest.approx(5.1 / 255), 0, 0, 255)


def test_histogram_counts_every_value_once() -> None:
    parts = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).unbind()
    counts = observed(*parts).counts
    assert counts is not None
    assert counts.sum() == 700
    assert len(counts) == BINS


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_at_most_minmax_and_much_less_under_a_heavy_tail(bits: int, symmetric: bool) -> None:
    values = heavy_tail()
    seen = observed(values)
    chosen = {method: choose_range(seen, bits, symmetric, method, 99.9) for method in ("minmax", "percentile", "mse")}
    errors = {method: error(values, found) for method, found in chosen.items()}
    if bits == 4:
        # A step s costs s^2 / 12. Shrinking 20 to 6 makes that 11 times less, for an outlier that costs 14^2 / 10^4.
        assert errors["mse"] < (1 / 11 + 0.02 / errors["minmax"]) * 1.5 * errors["minmax"]
    assert errors["mse"] <= 1.001 * errors["minmax"]  # they are compared on a histogram of 2048 bins, not on the values
    body = values[values.abs() < 2.5]
    assert error(body, chosen["percentile"]) < 0.1 * error(body, chosen["minmax"])  # it lets the outliers go


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_values_spread_evenly_keep_their_range(method: Method) -> None:
    values = torch.linspace(-1, 3, 100_001)
    chosen = choose_range(observed(values), 8, False, method, 99.99)
    # Clipping a share p of an even spread costs at least as much as its steps shrink: all methods stay within 2 %.
    assert chosen.scale == pytest.approx(4 / 255, rel=0.02)
    assert chosen.zero_point == pytest.approx(64, abs=1)


def test_costs_of_one_count_as_none_do_and_costs_of_two_twice() -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    plain, costly = observed(values), Observer()
    costly.see(values)
    assert not costly.has_counts
    costly.count(values, torch.full((1, 5), 2.0))
    assert costly.has_counts
    # Values at the border of two bins may fall into either: sums over neighbours.
    assert torch.allclose(costly.counts.cumsum(0), 2 * plain.counts.cumsum(0), atol=2)


def test_percentile_keeps_its_share_on_each_side() -> None:
    values = torch.cat([torch.linspace(-1, 1, 9800), torch.full((100,), 10.0), torch.full((100,), -10.0)])
    chosen = choose_range(observed(values), 8, True, "percentile", 98.0)
    assert chosen.scale * 127 == pytest.approx(1.0, abs=20 / BINS)
    kept = choose_range(observed(values), 8, True, "percentile", 99.9)
    assert kept.scale * 127 == pytest.approx(10.0, abs=20 / BINS)


def test_percentile_100_is_minmax() -> None:
    seen = observed(heavy_tail())
    full, minmax = (choose_range(seen, 8, False, method, 100.0) for method in ("percentile", "minmax"))
    assert full.scale == pytest.approx(minmax.scale)
    assert full.zero_point == minmax.zero_point


def test_percentile_where_most_values_are_zero() -> None:
    """A share of zeros larger than what is kept: the range ends in the bin of the zeros."""
    values = torch.cat([torch.zeros(9900), torch.linspace(1, 50, 100)])
    chosen = choose_range(observed(values), 8, False, "percentile", 95.0)
    assert chosen.scale * 255 == pytest.approx(50 / BINS, rel=0.01)


def test_percentile_of_values_on_one_side_of_zero_cuts_that_side() -> None:
    positive = torch.cat([torch.linspace(0, 1, 9900), torch.full((100,), 50.0)])
    chosen = choose_range(observed(positive), 8, False, "percentile", 99.0)
    assert chosen.zero_point == 0
    assert chosen.scale * 255 == pytest.approx(1.0, abs=50 / BINS)
    negative = choose_range(observed(-positive), 8, False, "percentile", 99.0)
    assert negative.zero_point == 255
    assert negative.scale * 255 == pytest.approx(1.0, abs=50 / BINS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_on_a_lattice_are_exact(symmetric: bool) -> None:
    """17 grey levels in [-1, 1]: 16 intervals of 15 steps each are exact; 255 steps in all, or 254, are not."""
    values = torch.linspace(-1, 1, 17).repeat(100)
    chosen = choose_range(observed(values), 8, symmetric, "mse", 100)
    assert chosen.scale == pytest.approx(1 / 120)
    assert error(values, chosen) < 1e-12


def test_mse_shrinks_each_end_by_itself() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0
    chosen = choose_range(observed(values), 4, False, "mse", 100)
    low = -chosen.zero_point * chosen.scale
    assert low <= -2.5  # the side without outliers is kept
    assert (15 - chosen.zero_point) * chosen.scale < 20


def test_expected_error_is_that_of_the_histogram() -> None:
    centers, counts = torch.tensor([0.1, 0.9, 3.0]).double(), torch.tensor([2.0, 1.0, 5.0]).double()
    found = expected_error(QuantRange(1.0, 0, 0, 2), centers, counts)
    assert found == pytest.approx(2 * 0.1**2 + 0.1**2 + 5 * 1.0**2)


def test_a_range_does_not_pass_the_ceiling_of_its_values() -> None:
    # steps of 0.5 between 0 and 6: the lattice asks for a range a little wider than 6
    values = torch.arange(13).repeat(50) * 0.5
    observer = Observer()
    observer.see(values)
    observer.count(values)
    free = choose_range(observer, 8, False, "mse", 99.99)
    capped = choose_range(observer, 8, False, "mse", 99.99, 6.0)
    assert (free.quant_max - free.zero_point) * free.scale > 6.0
    assert (capped.quant_max - capped.zero_point) * capped.scale <= 6.0 * (1 + 1e-9)

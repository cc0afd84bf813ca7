"""Sums by sample: they add up to the figures, survive what is not finite, and stay few."""

import numpy as np
import pytest

from exporter.metrics import WORST, Comparison, decibels
from exporter.sample_sums import SampleSums


def recorded(reference: np.ndarray, value: np.ndarray, limit: int = 512, batch: int = 4):
    sums, comparison = SampleSums(), Comparison()
    for start in range(0, len(reference), batch):
        parts = reference[start : start + batch], value[start : start + batch]
        sums.add(*parts, len(parts[0]))
        comparison.add(*parts)
    return sums.blocks(limit), comparison.figures()


@pytest.mark.parametrize("limit", [512, 7, 1])
def test_the_sums_add_up_to_the_figures(limit: int) -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((22, 3, 5)).astype(np.float32)
    value = reference + 0.5 * generator.standard_normal(reference.shape).astype(np.float32)
    sums, figures = recorded(reference, value, limit)
    assert len(sums.signal) == len(sums.noise) == len(sums.agreement) == min(limit, 22)
    # Sums are kept to 5 digits: 5e-6 in each, 2e-5 dB in their ratio.
    assert decibels(sum(sums.signal), sum(sums.noise)) == pytest.approx(figures.sqnr_db, abs=5e-5)
    if limit == 512:
        assert np.mean(sums.agreement) == pytest.approx(figures.top1_agreement, abs=1e-5)


def test_a_broken_sample_is_the_only_one_that_shows() -> None:
    reference = np.ones((3, 4), dtype=np.float32)
    value = reference.copy()
    value[1, 2] = np.nan
    sums, _ = recorded(reference, value)
    assert sums.noise == (0.0, WORST, 0.0)
    assert sums.signal[0] == 4.0


def test_infinities_in_both_are_equal() -> None:
    reference = np.array([[1.0, -np.inf], [2.0, -np.inf]])
    sums, _ = recorded(reference, reference)
    assert sums.signal == (1.0, 4.0)
    assert sums.noise == (0.0, 0.0)


def test_an_output_whose_first_axis_is_not_the_samples_counts_as_one() -> None:
    sums = SampleSums()
    sums.add(np.ones((2, 3)), np.zeros((2, 3)), 5)
    assert sums.blocks(512).signal == (6.0,)


def test_without_ranks_and_for_single_values_there_is_no_agreement() -> None:
    plain, narrow = SampleSums(ranks=False), SampleSums()
    plain.add(np.ones((2, 3)), np.ones((2, 3)), 2)
    narrow.add(np.ones((2, 1)), np.ones((2, 1)), 2)
    assert plain.blocks(512).agreement is None
    assert narrow.blocks(512).agreement is None

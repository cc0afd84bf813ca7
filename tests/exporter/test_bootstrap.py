"""Intervals: how often they err where nothing changed, and that pairing takes out what samples have in common."""

import numpy as np
import pytest

from exporter.bootstrap import FEWEST, agreement_change, sqnr_change
from exporter.report import Sums


def sums(noise: np.ndarray, agreement: np.ndarray | None = None) -> Sums:
    shares = None if agreement is None else tuple(map(float, agreement))
    return Sums((100.0,) * len(noise), tuple(map(float, noise)), shares)


@pytest.mark.parametrize("samples", [16, 100])
@pytest.mark.parametrize("paired", [True, False])
def test_noise_is_rarely_taken_for_a_change(samples: int, paired: bool) -> None:
    generator = np.random.default_rng(0)
    trials = 300
    wrong = 0
    for _ in range(trials):
        old, new = (sums(generator.lognormal(0, 0.7, samples)) for _ in range(2))
        interval = sqnr_change(old, new, paired=paired)
        assert interval is not None
        wrong += not interval.holds_zero
    # The level is 1 %; a bootstrap of few skewed samples errs somewhat more often. 3 % of 300 is 9, and a true rate of
    # 2 % passes 12 with a probability of 1 %.
    assert wrong <= 12


def test_a_change_that_samples_share_is_seen_only_when_paired() -> None:
    generator = np.random.default_rng(1)
    hard = generator.lognormal(0, 2.0, 64)  # some samples are a hundred times as noisy as others
    old, new = sums(hard), sums(hard * 1.1 * generator.lognormal(0, 0.02, 64))  # 0.4 dB worse on each
    paired, apart = sqnr_change(old, new, paired=True), sqnr_change(old, new, paired=False)
    assert paired is not None
    assert apart is not None
    assert paired.high < 0
    assert apart.holds_zero


def test_the_interval_lies_about_the_change() -> None:
    old, new = sums(np.full(20, 1.0)), sums(np.full(20, 10.0))
    interval = sqnr_change(old, new, paired=True)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((-10.0, -10.0))  # ten times the noise in every sample


def test_no_noise_at_all_has_a_finite_interval() -> None:
    interval = sqnr_change(sums(np.zeros(10)), sums(np.ones(10)), paired=True)
    assert interval is not None
    assert interval.low == pytest.approx(20.0 - 300.0)  # EXACT_DB is what equal values have


def test_agreement() -> None:
    share = np.array([1.0] * 30 + [0.0] * 10)
    worse = agreement_change(sums(share, share), sums(share, np.zeros(40)), paired=True)
    same = agreement_change(sums(share, share), sums(share, share), paired=True)
    assert worse is not None
    assert same is not None
    assert worse.high < 0
    assert (same.low, same.high) == (0.0, 0.0)
    assert agreement_change(sums(share), sums(share, share), paired=True) is None


def test_few_samples_say_nothing() -> None:
    few, enough = sums(np.ones(FEWEST - 1)), sums(np.ones(FEWEST))
    assert sqnr_change(few, enough, paired=False) is None
    assert sqnr_change(enough, enough, paired=False) is not None

"""How much of a difference between two comparisons is chance: the bootstrap over held-out samples.

The samples are drawn again RESAMPLES times, n from n with replacement, and the difference new - old is computed each
time; the interval that holds the middle LEVEL of these, widened by sqrt(n / (n - 1)) about the difference itself, is
what other samples of the same kind may show (Efron 1979, doi 10.1214/aos/1176344552; the factor corrects the spread of
few samples). Where old and new saw the same samples both use the same draw, which takes out what all have in common:
samples that are hard for any quantization. Draws are seeded: the same sums give the same interval.
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from exporter.metrics import EXACT_DB
from exporter.report import Sums

LEVEL = 0.99
"""A report holds many figures: at 95 % one in twenty that did not change would look as if it had."""

RESAMPLES = 2000
FEWEST = 5
"""Fewer samples say nothing about how samples differ."""

Numbers = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """What a difference may be with other samples."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """True when the difference may be chance."""
        return self.low <= 0 <= self.high


def sqnr_change(old: Sums, new: Sums, *, paired: bool) -> Interval | None:
    """Of new's SQNR minus old's in dB; None with fewer than FEWEST samples.

    `paired`: entry i of both comes from the same sample, as it can where they are equally many.
    """

    def sqnr(sums: Sums, draws: Numbers) -> Numbers:
        signal, noise = draws @ np.array(sums.signal), draws @ np.array(sums.noise)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = 10 * (np.log10(signal) - np.log10(noise))
        value[noise == 0] = EXACT_DB
        return np.asarray(np.clip(value, -EXACT_DB, EXACT_DB))

    before, after = len(old.noise), len(new.noise)
    if min(before, after) < FEWEST:
        return None
    everything = sqnr(new, np.ones((1, after))) - sqnr(old, np.ones((1, before)))
    drawn = sqnr(new, _draws(after, 0)) - sqnr(old, _draws(before, 0 if paired and before == after else 1))
    return _interval(float(everything[0]), drawn, min(before, after))


def agreement_change(old: Sums, new: Sums, *, paired: bool) -> Interval | None:
    """Of new's share of equal answers minus old's; None where one has none, or fewer than FEWEST samples."""
    if old.agreement is None or new.agreement is None:
        return None
    before, after = np.array(old.agreement), np.array(new.agreement)
    if min(len(before), len(after)) < FEWEST:
        return None
    second = 0 if paired and len(before) == len(after) else 1
    drawn = _draws(len(after), 0) @ after / len(after) - _draws(len(before), second) @ before / len(before)
    return _interval(float(after.mean() - before.mean()), drawn, min(len(before), len(after)))


def _interval(difference: float, drawn: Numbers, samples: int) -> Interval:
    widened = difference + (drawn - difference) * np.sqrt(samples / (samples - 1))
    low, high = np.quantile(widened, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


@functools.lru_cache(maxsize=8)
def _draws(samples: int, seed: int) -> Numbers:
    """How often each sample is in each draw, [RESAMPLES, samples]."""
    counts = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)
    return counts.astype(np.float64)

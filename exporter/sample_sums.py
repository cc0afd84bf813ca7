"""What each held-out sample contributes to a comparison, so that two reports can be compared beyond chance.

For sample i, r its reference and v its value:

    signal_i = sum r^2      noise_i = sum (r - v)^2      agreement_i = share of rows with the same largest entry

so that the SQNR over all is 10 log10(sum signal_i / sum noise_i). Entries that are not finite count as in
`exporter.metrics`. Many samples are put together, neighbours with neighbours, so that a report stays small.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exporter.metrics import WORST
from exporter.report import Sums

OUTPUT_BLOCKS = 512
"""At most so many entries for an output of a runtime."""

LAYER_BLOCKS = 16
"""And for a layer: a report of 500 layers grows by 150 kB."""

DIGITS = 5
"""Significant digits kept: a rounding of 5e-6 moves an SQNR by 2e-5 dB."""


class SampleSums:
    """Accumulates batches of (reference, value) of one output or layer; `ranks` False leaves out the agreement."""

    def __init__(self, *, ranks: bool = True) -> None:
        self._ranks = ranks
        self._signal: list[float] = []
        self._noise: list[float] = []
        self._agreement: list[float] = []

    def add(self, reference: ArrayLike, value: ArrayLike, samples: int) -> None:
        """Take in a batch of `samples`, both of one shape; where axis 0 is not theirs the batch counts as one."""
        r, v = np.asarray(reference), np.asarray(value)
        if not r.ndim or len(r) != samples:
            r, v = r[None], v[None]
        ranked = self._ranks and r.ndim >= 2 and r.shape[-1] >= 2 and np.issubdtype(r.dtype, np.floating)
        for one, other in zip(r, v, strict=True):
            if not one.size:
                continue
            a, b = one.astype(np.float64), other.astype(np.float64)
            if ranked:
                whole = ~np.isnan(b).any(axis=-1)
                self._agreement.append(float(np.mean((a.argmax(axis=-1) == b.argmax(axis=-1)) & whole)))
            self._add(a, b)

    def blocks(self, limit: int) -> Sums:
        """The sums of all samples so far, in at most `limit` blocks of neighbours."""
        agreement = [_rounded(np.mean(part)) for part in _parts(self._agreement, limit)] if self._agreement else None
        return Sums(
            signal=tuple(_rounded(np.sum(part)) for part in _parts(self._signal, limit)),
            noise=tuple(_rounded(np.sum(part)) for part in _parts(self._noise, limit)),
            agreement=None if agreement is None else tuple(agreement),
        )

    def _add(self, r: NDArray[np.float64], v: NDArray[np.float64]) -> None:
        usable = np.isfinite(r) & np.isfinite(v)
        broken = bool((~usable & ~((r == v) | (np.isnan(r) & np.isnan(v)))).any())
        error = np.where(usable, r, 0.0) - np.where(usable, v, 0.0)
        self._signal.append(float(np.sum(np.square(r, where=usable, out=np.zeros_like(r)))))
        self._noise.append(WORST if broken else float(np.sum(error * error)))


def _parts(values: list[float], limit: int) -> list[NDArray[np.float64]]:
    return np.array_split(np.array(values), min(limit, len(values))) if values else []


def _rounded(value: np.floating) -> float:
    return float(f"{min(float(value), WORST):.{DIGITS}g}")

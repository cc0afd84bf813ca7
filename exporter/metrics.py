"""How far a value is from its reference, batch by batch, so that no run holds all its outputs.

    sqnr_db         10 log10(sum r^2 / sum (r - v)^2)
    cosine          <r, v> / (|r| |v|)
    max_abs         max |r - v|            mean_abs   mean |r - v|
    top1_agreement  share of rows (along the last axis) whose largest entry is the same
    kl              mean over rows of KL(softmax(r) || softmax(v)), in nats

Sums run in float64. All figures are finite, so that JSON can hold them: equal values have an SQNR of EXACT_DB, and a
value that is not finite where its reference is gives every figure its worst possible value. Infinities and NaNs that
stand in both (masks) count as equal. top1_agreement and kl exist for floating-point outputs of rank 2 or more whose
last axis has at least 2 entries; they are None elsewhere.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXACT_DB = 300.0
"""SQNR of equal values; beyond what float64 tells apart (2^-53 is 319 dB in one element, far less over a sum)."""

WORST = 1e38
"""Stands for an unbounded error."""

BLOCK = 1 << 20
"""Elements converted to float64 at a time."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures named above; `nonfinite` counts entries that are NaN or infinite in one of the two only."""

    sqnr_db: float
    cosine: float
    max_abs: float
    mean_abs: float
    top1_agreement: float | None
    kl: float | None
    nonfinite: int = 0


class Comparison:
    """Accumulates batches of (reference, value) of one output; `ranks` False leaves out top1_agreement and kl."""

    def __init__(self, *, ranks: bool = True) -> None:
        self._ranks = ranks
        self._count = 0
        self._signal = self._noise = self._dot = self._energy = 0.0
        self._max_abs = self._sum_abs = 0.0
        self._rows = self._agree = 0
        self._kl = 0.0
        self._nonfinite = 0

    def add(self, reference: ArrayLike, value: ArrayLike) -> None:
        """Take in a batch; both of one shape [...]. Raises ValueError when the shapes differ."""
        r, v = np.asarray(reference), np.asarray(value)
        if r.shape != v.shape:
            raise ValueError(f"shapes differ: reference {list(r.shape)}, value {list(v.shape)}")
        width = r.shape[-1] if r.ndim else 1
        if r.size == 0:
            return
        ranked = self._ranks and r.ndim >= 2 and width >= 2 and np.issubdtype(r.dtype, np.floating)
        rows_r, rows_v = r.reshape(-1, width), v.reshape(-1, width)
        step = max(1, BLOCK // width)
        for start in range(0, len(rows_r), step):
            block_r = rows_r[start : start + step].astype(np.float64)
            block_v = rows_v[start : start + step].astype(np.float64)
            self._add_errors(block_r, block_v)
            if ranked:
                self._add_ranks(block_r, block_v)

    def figures(self) -> Figures:
        """The figures over all batches so far. Raises ValueError when there were none."""
        if self._count == 0:
            raise ValueError("nothing was compared")
        broken = self._nonfinite > 0
        norms = math.sqrt(self._signal * self._energy)
        cosine = float(self._noise == 0)
        if self._noise > 0 and norms > 0:
            cosine = min(1.0, max(-1.0, self._dot / norms))
        return Figures(
            sqnr_db=-EXACT_DB if broken else decibels(self._signal, self._noise),
            cosine=-1.0 if broken else cosine,
            max_abs=WORST if broken else min(self._max_abs, WORST),
            mean_abs=WORST if broken else min(self._sum_abs / self._count, WORST),
            top1_agreement=self._agree / self._rows if self._rows else None,
            kl=(WORST if broken else min(self._kl / self._rows, WORST)) if self._rows else None,
            nonfinite=self._nonfinite,
        )

    def _add_errors(self, r: NDArray[np.float64], v: NDArray[np.float64]) -> None:
        self._count += r.size
        usable = np.isfinite(r) & np.isfinite(v)
        if not usable.all():
            same = (r == v) | (np.isnan(r) & np.isnan(v))
            self._nonfinite += int(np.count_nonzero(~usable & ~same))
            r, v = np.where(usable, r, 0.0), np.where(usable, v, 0.0)
        error = np.abs(r - v)
        self._signal += float(np.vdot(r, r))
        self._energy += float(np.vdot(v, v))
        self._dot += float(np.vdot(r, v))
        self._noise += float(np.vdot(error, error))
        self._max_abs = max(self._max_abs, float(error.max()))
        self._sum_abs += float(error.sum())

    def _add_ranks(self, r: NDArray[np.float64], v: NDArray[np.float64]) -> None:
        self._rows += len(r)
        whole = ~np.isnan(v).any(axis=1)
        self._agree += int(np.count_nonzero((r.argmax(axis=1) == v.argmax(axis=1)) & whole))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            log_p, log_q = _log_softmax(r), _log_softmax(v)
            p = np.exp(log_p)
            divergence = np.where(p > 0, p * (log_p - log_q), 0.0).sum()
        self._kl += float(divergence) if np.isfinite(divergence) else WORST


def compare(reference: ArrayLike, value: ArrayLike) -> Figures:
    """The figures of one pair."""
    comparison = Comparison()
    comparison.add(reference, value)
    return comparison.figures()


def sqnr_db(reference: ArrayLike, value: ArrayLike) -> float:
    """SQNR in dB of one pair; EXACT_DB when equal."""
    return compare(reference, value).sqnr_db


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), within +-EXACT_DB."""
    if noise == 0:
        return EXACT_DB
    if signal == 0:
        return -EXACT_DB
    return min(EXACT_DB, max(-EXACT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result

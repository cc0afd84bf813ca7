"""Figures on values worked out by hand, in batches, and at the edges: equal, empty, masked, broken."""

import json
import math

import numpy as np
import pytest

from exporter import metrics
from exporter.metrics import EXACT_DB, WORST, Comparison, compare, decibels, sqnr_db


def test_figures_of_a_pair_worked_out_by_hand():
    figures = compare([[3.0, 4.0]], [[3.0, 3.0]])
    assert figures.sqnr_db == pytest.approx(10 * math.log10(25 / 1), rel=1e-12)  # |r|^2 = 25, |r - v|^2 = 1
    assert figures.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)), rel=1e-12)
    assert (figures.max_abs, figures.mean_abs, figures.nonfinite) == (1.0, 0.5, 0)


def test_kl_of_two_distributions_worked_out_by_hand():
    reference, value = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]) + 7  # softmax does not see a shift
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert compare(reference, value).kl == pytest.approx(expected, rel=1e-12)


def test_top1_counts_rows_of_the_last_axis():
    reference = np.array([[[1.0, 2.0], [2.0, 1.0]], [[5.0, 0.0], [0.0, 5.0]]])
    value = np.array([[[1.0, 2.0], [1.0, 2.0]], [[5.0, 0.0], [0.0, 5.0]]])
    assert compare(reference, value).top1_agreement == 0.75


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (np.zeros(4, np.float32), "rank 1"),
        (np.zeros((4, 1), np.float32), "nothing to choose from"),
        (np.zeros((4, 3), np.int64), "token ids are no logits"),
    ],
)
def test_no_ranking_where_the_last_axis_is_no_choice(reference, why):
    figures = compare(reference, reference)
    assert (figures.top1_agreement, figures.kl) == (None, None), why


def test_batches_and_blocks_add_up_to_the_whole(monkeypatch):
    random = np.random.default_rng(0)
    reference = random.normal(size=(30, 7, 11)).astype(np.float32)
    value = reference + random.normal(scale=0.1, size=reference.shape).astype(np.float32)
    whole = compare(reference, value)
    monkeypatch.setattr(metrics, "BLOCK", 40)  # 3 rows of 11 at a time
    parts = Comparison()
    for start in range(0, 30, 4):
        parts.add(reference[start : start + 4], value[start : start + 4])
    for name, figure in vars(parts.figures()).items():
        # float64 sums of 2310 terms in another order differ by less than 2310 * 2^-53 = 3e-13
        assert figure == pytest.approx(getattr(whole, name), rel=1e-12), name


def test_equal_values_are_exact_and_fit_json():
    figures = compare(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    assert (figures.sqnr_db, figures.cosine, figures.max_abs, figures.kl) == (EXACT_DB, 1.0, 0.0, 0.0)
    json.dumps(vars(figures), allow_nan=False)


def test_something_out_of_nothing_is_the_worst_sqnr():
    assert compare(np.zeros(3), np.ones(3)).sqnr_db == -EXACT_DB
    assert compare(np.zeros(3), np.ones(3)).cosine == 0.0
    assert compare(np.zeros(3), np.zeros(3)).sqnr_db == EXACT_DB


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_gets_the_worst_of_everything(broken):
    reference = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], np.float32)
    value = reference.copy()
    value[0, 2] = broken
    figures = compare(reference, value)
    assert (figures.sqnr_db, figures.cosine) == (-EXACT_DB, -1.0)
    assert (figures.max_abs, figures.mean_abs, figures.kl) == (WORST, WORST, WORST)
    assert figures.nonfinite == 1
    json.dumps(vars(figures), allow_nan=False)


def test_a_row_with_nan_agrees_with_nothing():
    # numpy's argmax returns the NaN's place, which here is also the reference's
    assert compare([[1.0, 2.0]], [[1.0, np.nan]]).top1_agreement == 0.0


def test_infinities_that_stand_in_both_are_masks():
    reference = np.array([[1.0, -np.inf, 2.0]])
    figures = compare(reference, reference + np.array([[0.0, 0.0, 0.5]]))
    assert figures.nonfinite == 0
    assert figures.max_abs == 0.5
    # softmax over the two open entries: (1, 2) against (1, 2.5)
    p, q = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(-1.5))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert figures.kl == pytest.approx(expected, rel=1e-9)


def test_half_precision_does_not_overflow_the_sums():
    reference = np.full(1000, 60000.0, np.float16)
    assert compare(reference, reference / 2).sqnr_db == pytest.approx(10 * math.log10(4), rel=1e-12)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"reference \[2, 3\], value \[3, 2\]"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))


def test_nothing_compared_has_no_figures():
    comparison = Comparison()
    comparison.add(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="nothing was compared"):
        comparison.figures()


def test_sqnr_and_decibels_shortcuts():
    assert sqnr_db([2.0], [1.0]) == pytest.approx(10 * math.log10(4), rel=1e-12)
    assert decibels(1e-320, 1e300) == -EXACT_DB

"""Figures as text, and which layers are shown first."""

import pytest

from exporter.metrics import EXACT_DB, WORST
from exporter.render.text import (
    count,
    decibels,
    kernels,
    magnitude,
    metric,
    percent,
    shorten,
    size,
    verdict,
    worst_layers,
)
from exporter.report import GateResult, LayerDiff, LayerSqnr, Report


def layer(name: str, **figures: object) -> LayerDiff:
    return LayerDiff(name, "linear", "int8_channel", 8.0, 100, **figures)


def report(**parts: object) -> Report:
    return Report({}, {}, {}, {}, **parts)


PASSED, FAILED = GateResult("a", 1.0, True), GateResult("b", 1.0, False)
UNMEASURED = GateResult("c", None, False, measured=False)


@pytest.mark.parametrize(
    ("gates", "line"),
    [
        ((), "done, no gates set"),
        ((PASSED,), "passed its gate"),
        ((PASSED, PASSED), "passed all 2 gates"),
        ((PASSED, FAILED, UNMEASURED), "1 of 3 gates failed"),
        ((FAILED,), "1 of 1 gate failed"),
        ((PASSED, UNMEASURED), "1 of 2 gates could not be measured"),
    ],
)
def test_verdict(gates, line):
    assert verdict(report(gates=gates)) == line


def test_worst_layers_go_by_accumulated_then_own_then_weight():
    layers = (
        layer("float"),
        layer("weight only", weight_sqnr_db=20.0),
        layer("own", weight_sqnr_db=1.0, output_sqnr_db=LayerSqnr(own=15.0)),
        layer("accumulated", weight_sqnr_db=1.0, output_sqnr_db=LayerSqnr(own=1.0, accumulated=30.0)),
    )
    names = [entry.name for entry in worst_layers(report(layers=layers), 3)]
    assert names == ["own", "weight only", "accumulated"]


def test_kernels_are_counted_most_used_first():
    used = [layer("a", kernel="QGemm"), layer("b", kernel="QLinearConv"), layer("c", kernel="QLinearConv"), layer("d")]
    assert list(kernels(used).items()) == [("QLinearConv", 2), ("QGemm", 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (decibels(34.26), "34.3"),
        (decibels(EXACT_DB), "exact"),
        (decibels(-EXACT_DB), "broken"),
        (decibels(None), "-"),
        (magnitude(0.0123456), "0.0123"),
        (magnitude(WORST), "unbounded"),
        (magnitude(None), "-"),
        (percent(0.99416), "99.42 %"),
        (percent(None), "-"),
        (metric(12.345678), "12.3457"),
        (metric(None), "-"),
        (size(999), "999 B"),
        (size(1000), "1 kB"),
        (size(999_600), "1 MB"),
        (size(1_234_567), "1.23 MB"),
        (size(2_500_000_000_000), "2500 GB"),
        (count(431), "431"),
        (count(4_200_000), "4.2 M"),
        (shorten("features.0.conv", 15), "features.0.conv"),
        (shorten("features.0.conv", 10), "feat..conv"),
    ],
)
def test_figures_as_text(text, expected):
    assert text == expected

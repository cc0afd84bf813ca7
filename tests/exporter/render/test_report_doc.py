"""docs/report.md explains every figure and cause that a report shows."""

import dataclasses
from pathlib import Path

import pytest

from exporter import causes
from exporter.gates import LAYER_FIGURES
from exporter.report import Evidence

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "report.md").read_text(encoding="utf-8")

KINDS = (
    causes.LOWERING,
    causes.INHERITED,
    causes.CLIPPING,
    causes.OUTLIERS,
    causes.COARSE,
    causes.ROUNDING,
    causes.FOLDING,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cause_has_a_row(kind):
    assert f"| {kind} | " in TEXT


@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(Evidence)), *LAYER_FIGURES])
def test_a_figure_is_named(name):
    assert f"`{name}" in TEXT or f".{name}" in TEXT

"""The bench of scale: its fit, its plot, and models that other readers take."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tools.bench.scale import Row, draw, fit, fits, write_safetensors

ROWS = [Row(10_000_000 * n, 99.0, 5.0 + 2 * n, 400_000_000 + 1_000_000 * n, 120.0) for n in (1, 4, 11, 40)]


def test_the_fit_finds_the_line_and_says_what_it_explains() -> None:
    line = fit([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((3.0, 2.0, 1.0))
    # least squares over (0, 0), (1, 1), (2, 0): the level line at 1/3, which explains nothing
    flat = fit([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])
    assert (flat.intercept, flat.slope, flat.r_squared) == pytest.approx((1 / 3, 0.0, 0.0), abs=1e-12)


def test_rows_are_fitted_over_their_parameters() -> None:
    lines = fits(ROWS)
    assert lines["seconds of the processor"].slope == pytest.approx(2e-7)
    assert lines["peak memory, MB"].slope == pytest.approx(1e-7)
    assert lines["peak memory, MB"].intercept == pytest.approx(400)


def test_the_plot_has_a_point_for_every_row_inside_its_frame() -> None:
    root = ET.fromstring(draw(ROWS))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    points = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(points) == 2 * len(ROWS)
    for point in points:
        assert 0 < float(point.attrib["cx"]) < width
        assert 0 < float(point.attrib["cy"]) < height


def test_a_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)

"""The files of a report: what is written, what does not change from run to run, and latency added later."""

import json
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.report import Report
from exporter.report_files import add_latency, write_reports
from tests.exporter.render.reports import LATENCY, SMALL


def test_all_are_written(tmp_path: Path) -> None:
    write_reports(tmp_path, SMALL, {"capture": 1.23456})
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "junit.xml",
        "timings.json",
    }
    assert Report.from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == SMALL
    assert json.loads((tmp_path / "timings.json").read_text(encoding="utf-8")) == {"seconds": {"capture": 1.235}}
    assert "1.235" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_only_timings_and_the_page_show_time(tmp_path: Path) -> None:
    texts = []
    for seconds in (1.0, 2.0):
        write_reports(tmp_path, SMALL, {"capture": seconds})
        texts.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    changed = {name for name in texts[0] if texts[0][name] != texts[1][name]}
    assert changed == {"timings.json", "report.html"}


def test_latency_is_added_to_timings_and_page(tmp_path: Path) -> None:
    write_reports(tmp_path, SMALL, {"capture": 1.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    add_latency(tmp_path, LATENCY)
    timings = json.loads((tmp_path / "timings.json").read_text(encoding="utf-8"))
    assert timings == {"seconds": {"capture": 1.0}, "latency": LATENCY}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2.00x to 2.50x" in page
    assert "capture" in page
    for name in ("report.json", "report.md", "junit.xml"):
        assert (tmp_path / name).read_bytes() == before[name]


def test_a_folder_without_a_report_is_left_alone(tmp_path: Path) -> None:
    add_latency(tmp_path, LATENCY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [("report.json", "{"), ("timings.json", "{"), ("timings.json", "[1]"), ("timings.json", '"text"')],
)
def test_damaged_files_are_an_error_of_one_line(tmp_path: Path, name: str, text: str) -> None:
    write_reports(tmp_path, SMALL, {})
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="cannot be brought up to date") as caught:
        add_latency(tmp_path, LATENCY)
    assert "\n" not in str(caught.value)

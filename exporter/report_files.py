"""The files a person or a pipeline reads: report.json, report.md, report.html, junit.xml and timings.json.

timings.json holds what differs from one run to the next, and only report.html shows it:

    seconds   {stage: seconds} of the compilation
    latency   {runtime, threads, rounds, timings: [{batch, float_s, quantized_s}]} of `qexport bench`, where it was
              run; runtime is onnxruntime, tensorrt or rtx, and only the first has threads
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.render import html, junit, markdown
from exporter.report import Json, Report

REPORT = "report.json"
TIMINGS = "timings.json"
PAGE = "report.html"


def write_reports(folder: Path, report: Report, seconds: Mapping[str, float]) -> None:
    """Write them all into `folder`; `seconds` is {stage: seconds}."""
    timings = {"seconds": {stage: round(value, 3) for stage, value in seconds.items()}}
    _write_texts(folder, report)
    _write_timings(folder, report, timings)


def add_latency(folder: Path, latency: Mapping[str, Any]) -> None:
    """Put the latency that was measured of an output folder into its timings.json and its page.

    A folder without a report is left as it is. Raises InputError when its files are damaged.
    """
    if not (folder / REPORT).is_file():
        return
    try:
        report = Report.from_json((folder / REPORT).read_text(encoding="utf-8"))
        timings = json.loads((folder / TIMINGS).read_text(encoding="utf-8"))
        _write_timings(folder, report, {**timings, "latency": latency})
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"its report cannot be brought up to date: {error}", where=str(folder)) from error


def add_engine(folder: Path, engine: Mapping[str, Json], file: Path) -> None:
    """Put an engine that was built of an output folder later, the `file` in it, into its reports.

    `engine` is that section of report.json. Raises InputError when the reports are damaged.
    """
    try:
        report = Report.from_json((folder / REPORT).read_text(encoding="utf-8"))
        timings = json.loads((folder / TIMINGS).read_text(encoding="utf-8"))
        files = {**report.sizes.files, file.name: file.stat().st_size}
        report = dataclasses.replace(report, engine=engine, sizes=dataclasses.replace(report.sizes, files=files))
        _write_texts(folder, report)
        _write_timings(folder, report, timings)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"its report cannot be brought up to date: {error}", where=str(folder)) from error


def _write_texts(folder: Path, report: Report) -> None:
    (folder / REPORT).write_text(report.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(markdown.render(report), encoding="utf-8")
    (folder / "junit.xml").write_text(junit.render(report), encoding="utf-8")


def _write_timings(folder: Path, report: Report, timings: Mapping[str, Any]) -> None:
    (folder / TIMINGS).write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(html.render(report, timings), encoding="utf-8")

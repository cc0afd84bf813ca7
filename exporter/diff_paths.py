"""`qexport diff OLD NEW`: read both sides, compare, judge."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from exporter.diff import ReportDiff, diff_reports, read_report
from exporter.diff_gates import evaluate_diff, parse_diff_gate
from exporter.diff_onnx import Source, report_of_onnx
from exporter.errors import InputError
from exporter.output import is_fault_of_disk


def diff_paths(old: Path, new: Path, *, gates: Sequence[str] = (), source: Source | None = None) -> ReportDiff:
    """Compare OLD, a report.json, output folder or ONNX file, with NEW, one of the first two. Raises InputError."""
    parsed = [parse_diff_gate(expr) for expr in gates]
    after = read_report(new)
    before = read_report(old) if is_report(old) else report_of_onnx(old, after, source or Source())
    found = diff_reports(before, after, (str(old), str(new)))
    return dataclasses.replace(
        found,
        remarks=(*(before.warnings if before.model.get("kind") == "onnx" else ()), *found.remarks),
        gates=evaluate_diff(parsed, before, after, found),
    )


def is_report(path: Path) -> bool:
    """True for a folder, a file that begins like JSON, and what is not there: everything but an ONNX file."""
    if not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def write_text(path: Path, text: str) -> None:
    """Write what --out asked for. Raises InputError when it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = "the disk is full" if is_fault_of_disk(error) else error.strerror
        raise InputError(f"cannot be written: {reason}", where=f"--out {path}") from error

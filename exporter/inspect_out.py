"""`qexport inspect OUT`: what an output folder holds, from its report and manifest, and whether its files are whole."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.errors import InputError
from exporter.output import MANIFEST, beside, file_sha256
from exporter.render.text import count, decibels, gate_state, headline, metric, percent, size, verdict
from exporter.report import LayerDiff, Report
from passes.cache import count as kept_layers

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class OutputState:
    """An output folder: its report, {file: changed, missing or ok} against its manifest, and the manifest's key."""

    report: Report
    files: dict[str, str]
    key: str | None = None


def inspect_out(out: Path) -> OutputState:
    """Read the folder `out`. Raises InputError when it is not an output of qexport."""
    if not out.is_dir():
        kept = kept_layers(beside(out, "cache"))
        if kept:
            what = f"not finished: a run was stopped when {kept} of its layers were quantized"
            raise InputError(what, where=str(out), fix="give the same command again: it goes on from there")
        raise InputError("no such folder", where=str(out), fix="give what --out named")
    try:
        report = Report.from_json((out / REPORT).read_text(encoding="utf-8"))
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        hashes = _hashes(manifest)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise InputError(f"is not an output of qexport: it has no {name}", where=str(out)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"is not an output that this qexport reads: {error}", where=str(out)) from error
    files = {name: _state(out / name, digest) for name, digest in hashes.items()}
    return OutputState(report, files, manifest.get("key"))


def whole_output(out: Path) -> OutputState | None:
    """The output in `out` if it is one, and each of its files is there and as it was written."""
    try:
        state = inspect_out(out)
    except InputError:
        return None
    reports = ("report.md", "report.html", "junit.xml", "timings.json")
    whole = all(found == "ok" for found in state.files.values()) and all((out / name).is_file() for name in reports)
    return state if whole else None


def render(state: OutputState) -> RenderableType:
    """Verdict, layers, files, gates."""
    report = state.report
    title = f"{report.model.get('name', 'model')}: {verdict(report)}"
    parts: list[RenderableType] = [Text(title, style="bold"), Text(headline(report), style="dim")]
    for table in (_layers(report), _files(state), _gates(report)):
        if table.row_count:
            parts += [Text(""), table]
    return Group(*parts)


def _hashes(manifest: Any) -> dict[str, str]:
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ValueError(f"{MANIFEST} is damaged")
    return {str(name): str(digest) for name, digest in files.items()}


def _state(path: Path, digest: str) -> str:
    if not path.is_file():
        return "missing"
    return "ok" if file_sha256(path) == digest else "changed"


def _layers(report: Report) -> Table:
    table = _table("layer", "kind", "format", "bits", "params", "SQNR dB", "kernel")
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for layer in report.layers:
        _add(table, *_layer(layer))
    if report.layers:
        params = sum(layer.params for layer in report.layers)
        bits = sum(layer.bits_per_weight * layer.params for layer in report.layers) / params
        _add(table, f"{len(report.layers)} layers", "", "", f"{bits:.2f}", count(params), "", "")
    return table


def _layer(layer: LayerDiff) -> tuple[str, ...]:
    sqnr = decibels(layer.output_sqnr_db.accumulated)
    bits = f"{layer.bits_per_weight:.2f}"
    return layer.name, layer.kind, layer.format, bits, count(layer.params), sqnr, layer.kernel or ""


def _files(state: OutputState) -> Table:
    sizes = state.report.sizes
    table = _table("file", "size", "of float", "")
    for name, found in state.files.items():
        written = sizes.files.get(name)
        share = percent(written / sizes.float_parameters) if written and sizes.float_parameters else ""
        _add(table, name, size(written) if written is not None else "", share, "" if found == "ok" else found)
    return table


def _gates(report: Report) -> Table:
    table = _table("gate", "measured", "verdict", "at")
    for gate in report.gates:
        _add(table, gate.expr, metric(gate.value), gate_state(gate), gate.where)
    return table


def _add(table: Table, *cells: str) -> None:
    """As it reads: rich would take a name in square brackets for markup."""
    table.add_row(*map(Text, cells))


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table

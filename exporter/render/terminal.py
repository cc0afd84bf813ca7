"""A report for the terminal: what was made, how far it is from float, what to look at. Fits 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exporter.render.sensitivity_text import budget_line, sensitivity_headings, sensitivity_rows
from exporter.render.text import (
    RUNTIMES,
    comparisons,
    decibels,
    gate_state,
    headline,
    kernels,
    loss_by_stage,
    magnitude,
    metric,
    percent,
    shorten,
    size,
    verdict,
    worst_layers,
)
from exporter.report import Report

WORST_LAYERS = 5
STYLES = {"passed": "green", "FAILED": "bold red", "not measured": "bold yellow"}


def render(report: Report) -> RenderableType:
    """What a console prints, line by line; a console without colour loses nothing but the colour."""
    parts: list[RenderableType] = [_title(report), Text(headline(report), style="dim")]
    parts += [Text(budget_line(report))] if report.budget is not None else []
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    tables = (
        *_comparisons(report),
        _metrics(report),
        _layers(report),
        _sensitivity(report),
        _sizes(report),
        _gates(report),
    )
    parts += [Padding(table, (1, 0, 0, 0)) for table in tables if table.row_count]
    lost = loss_by_stage(report)
    if lost:
        parts.append(Text(f"\n{lost}"))
    used = ", ".join(f"{name} {number}" for name, number in kernels(report.layers).items())
    if used:
        parts.append(Text(f"\nkernels: {used}"))
    return Group(*parts)


def _title(report: Report) -> Text:
    failed = any(gate.measured and not gate.passed for gate in report.gates)
    state = "passed" if report.gates_passed else "FAILED" if failed else "not measured"
    return Text.assemble((str(report.model.get("name", "model")), "bold"), ": ", (verdict(report), STYLES[state]))


def _comparisons(report: Report) -> list[Table]:
    tables = []
    for against, rows in comparisons(report).items():
        table = _table(against, "SQNR dB", "cosine", "max error", "top-1")
        for name, figures in rows:
            _add(
                table,
                shorten(name, 40),
                decibels(figures.sqnr_db),
                f"{figures.cosine:.5f}",
                magnitude(figures.max_abs),
                percent(figures.top1_agreement),
            )
        tables.append(table)
    return tables


def _metrics(report: Report) -> Table:
    runtimes = [name for name in RUNTIMES if any(name in values for values in report.metrics.values())]
    table = _table("metric", "float", *(RUNTIMES[name] for name in runtimes))
    for name, values in report.metrics.items():
        _add(table, shorten(name, 20), *(metric(values.get(runtime)) for runtime in ("reference", *runtimes)))
    return table


def _layers(report: Report) -> Table:
    table = _table("worst layers, in dB", "bits", "weight", "own", "total", "kernel")
    table.columns[-1].justify = "left"
    for layer in worst_layers(report, WORST_LAYERS):
        output = layer.output_sqnr_db
        figures = (layer.weight_sqnr_db, output.own, output.worst)
        kernel = shorten(layer.kernel or "", 21)
        _add(table, shorten(layer.name, 26), f"{layer.bits_per_weight:.2f}", *map(decibels, figures), kernel)
    return table


def _sensitivity(report: Report) -> Table:
    columns = 5  # the layer, three figures and one metric fit
    table = _table(*sensitivity_headings(report)[:columns])
    for name, *figures in sensitivity_rows(report, WORST_LAYERS):
        _add(table, shorten(name, 26), *figures[: columns - 1])
    return table


def _sizes(report: Report) -> Table:
    table = _table("file", "size", "of float")
    whole = report.sizes.float_parameters
    for name, written in sorted(report.sizes.files.items()):
        _add(table, name, size(written), percent(written / whole if whole else None))
    return table


def _gates(report: Report) -> Table:
    table = _table("gate", "measured", "verdict", "at")
    table.columns[-2].justify = table.columns[-1].justify = "left"
    table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    for gate in report.gates:
        state = gate_state(gate)
        _add(
            table, shorten(gate.expr, 34), metric(gate.value), Text(state, style=STYLES[state]), shorten(gate.where, 60)
        )
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row as it reads: rich would take a name in square brackets for markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _table(*headings: str) -> Table:
    """A table of names, to the left, and figures, to the right; cells are cut to fit before they get here."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table

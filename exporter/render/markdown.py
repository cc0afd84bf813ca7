"""A report as markdown, short enough for a comment on a pull request."""

from collections.abc import Sequence

from exporter.render.text import (
    FIGURES,
    NONE,
    RUNTIMES,
    command,
    comparisons,
    decibels,
    gate_state,
    headline,
    kernels,
    layer_sqnr,
    measured,
    metric,
    percent,
    plain,
    plural,
    size,
    verdict,
    worst_layers,
)
from exporter.report import PassRecordView, Report

WORST_LAYERS = 8
SKIPS_SHOWN = 40
ROWS_SHOWN = 40
"""Limits that keep the text well under the 65536 characters of a comment on GitHub."""


def render(report: Report) -> str:
    """The report as markdown: verdict, warnings, figures, worst layers, passes, how to repeat it."""
    sections = [
        f"## qexport {_cell(report.model.get('name', 'model'))}: {verdict(report)}",
        headline(report),
        *(f"> **Warning:** {_cell(warning)}" for warning in report.warnings),
        _gates(report),
        _comparisons(report),
        _metrics(report),
        _sizes(report),
        _layers(report),
        _passes(report),
        _repeat(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _gates(report: Report) -> str:
    rows = [(f"`{gate.expr}`", metric(gate.value), _bold(gate_state(gate)), gate.where) for gate in report.gates]
    return _table(("gate", "measured", "", "at"), rows, "lrll")


def _comparisons(report: Report) -> str:
    tables = []
    for against, compared in comparisons(report).items():
        rows = [(name, *(read(figures) for _, read in FIGURES)) for name, figures in compared]
        tables.append(_table((against, *(name for name, _ in FIGURES)), rows, "l" + "r" * len(FIGURES)))
    return "\n\n".join(table for table in tables if table)


def _metrics(report: Report) -> str:
    runtimes = [name for name in RUNTIMES if any(name in values for values in report.metrics.values())]
    rows = [
        (name, metric(values.get("reference")), *(metric(values.get(runtime)) for runtime in runtimes))
        for name, values in report.metrics.items()
    ]
    return _table(("metric", "float", *(RUNTIMES[name] for name in runtimes)), rows, "l" + "r" * (len(runtimes) + 1))


def _sizes(report: Report) -> str:
    whole = report.sizes.float_parameters
    rows = [
        (f"`{name}`", size(bytes_), percent(bytes_ / whole) if whole else NONE)
        for name, bytes_ in sorted(report.sizes.files.items())
    ]
    return _table(("file", "size", "of float"), rows, "lrr")


def _layers(report: Report) -> str:
    shown = worst_layers(report, WORST_LAYERS)
    rows = [
        (
            f"`{layer.name}`",
            layer.format,
            f"{layer.bits_per_weight:.2f}",
            decibels(layer.weight_sqnr_db),
            decibels(layer.output_sqnr_db.own),
            decibels(layer.output_sqnr_db.accumulated),
            layer.kernel or NONE,
        )
        for layer in shown
    ]
    headings = ("layer", "format", "bits", "weight dB", "own dB", "accumulated dB", "kernel")
    known = sum(layer_sqnr(layer) is not None for layer in report.layers)
    title = f"**Worst layers** ({len(shown)} of {known})"
    used = ", ".join(f"{name} {number}" for name, number in kernels(report.layers).items())
    parts = [title, _table(headings, rows, "llrrrrl")] if rows else []
    return "\n\n".join([*parts, f"Kernels: {_cell(used)}"] if used else parts)


def _passes(report: Report) -> str:
    rows = [
        (
            f"`{entry.name}`" + (" (inserted)" if entry.inserted else ""),
            ", ".join(f"{key}={plain(value)}" for key, value in entry.options.items()),
            str(len(entry.changed)),
            str(len(entry.skipped)),
            ", ".join(f"{key} {measured(value)}" for key, value in entry.measured.items()),
        )
        for entry in report.passes
    ]
    table = _table(("pass", "options", "changed", "skipped", "measured"), rows, "llrrl")
    skipped = [line for entry in report.passes for line in _skips(entry)]
    if not skipped:
        return table
    more = [f"- and {len(skipped) - SKIPS_SHOWN} more in report.json"] if len(skipped) > SKIPS_SHOWN else []
    listed = "\n".join(skipped[:SKIPS_SHOWN] + more)
    title = f"{plural(len(skipped), 'node')} skipped"
    return f"{table}\n\n<details><summary>{title}</summary>\n\n{listed}\n\n</details>"


def _skips(entry: PassRecordView) -> list[str]:
    return [f"- `{entry.name}` left `{skip.node}`: {_cell(skip.why)}" for skip in entry.skipped]


def _repeat(report: Report) -> str:
    environment = ", ".join(f"{key} {plain(value)}" for key, value in report.environment.items())
    source = ", ".join(f"{key} {plain(value)}" for key, value in report.calibration.items())
    lines = [f"```\n{command(report)}\n```"]
    lines += ["with the rules per layer of `recipe.layers` in report.json"] if report.recipe.get("layers") else []
    lines += [f"Calibration: {_cell(source)}"] if source else []
    lines += [f"Made with {_cell(environment)}"] if environment else []
    return "\n\n".join(["**Repeat**", *lines])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    if not rows:
        return ""
    rule = [{"l": "---", "r": "---:"}[side] for side in align]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (headings, rule, *rows[:ROWS_SHOWN])]
    more = [f"\n{len(rows) - ROWS_SHOWN} more in report.json"] if len(rows) > ROWS_SHOWN else []
    return "\n".join([*lines, *more])


def _cell(value: object) -> str:
    """Text on one line that cannot end a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _bold(state: str) -> str:
    return state if state == "passed" else f"**{state}**"

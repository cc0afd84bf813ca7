"""A report as markdown, short enough for a comment on a pull request."""

import collections
from collections.abc import Sequence

from exporter.render.sensitivity_text import budget_line, sensitivity_headings, sensitivity_rows
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
    loss_by_stage,
    measured,
    metric,
    numbers_that_matter,
    percent,
    plain,
    plural,
    shorten,
    size,
    verdict,
    worst_layers,
)
from exporter.report import PassRecordView, Report
from exporter.stages import short

WORST_LAYERS = 10
SKIPS_SHOWN = 20
ROWS_SHOWN = 20
CELL_WIDTH = 200
ENGINE_FIGURES = ("flavor", "version", "engine_bytes", "weights_bytes", "scratch_bytes")
"""Limits that keep the text near 10 kB; a comment on GitHub holds 65536 characters."""


def render(report: Report) -> str:
    """The report as markdown: verdict, warnings, figures, worst layers, passes, how to repeat it."""
    sections = [
        f"## qexport {_cell(_text(report.model.get('name', 'model')))}: {verdict(report)}",
        headline(report),
        _numbers(report),
        _cell(_text(budget_line(report))),
        *(f"> **Warning:** {_cell(_text(warning))}" for warning in report.warnings),
        _gates(report),
        _comparisons(report),
        _metrics(report),
        _sizes(report),
        _layers(report),
        _sensitivity(report),
        _passes(report),
        _repeat(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _numbers(report: Report) -> str:
    """Accuracy and size; speed is in report.html, because this text is the same in every run."""
    accuracy, size_, _ = numbers_that_matter(report, {})
    known = [number for number in (accuracy, size_) if number.value != NONE]
    return "\n".join(
        f"- **{_cell(_text(number.value))}** {_cell(_text(number.label))}"
        + (f" ({_cell(number.note)})" if number.note else "")
        for number in known
    )


def _gates(report: Report) -> str:
    rows = [(_code(gate.expr), metric(gate.value), _bold(gate_state(gate)), _text(gate.where)) for gate in report.gates]
    return _table(("gate", "measured", "", "at"), rows, "lrll")


def _comparisons(report: Report) -> str:
    tables = []
    for against, compared in comparisons(report).items():
        rows = [(_text(name), *(read(figures) for _, read in FIGURES)) for name, figures in compared]
        tables.append(_table((against, *(name for name, _ in FIGURES)), rows, "l" + "r" * len(FIGURES)))
    return "\n\n".join(table for table in tables if table)


def _metrics(report: Report) -> str:
    runtimes = [name for name in RUNTIMES if any(name in values for values in report.metrics.values())]
    rows = [
        (_text(name), metric(values.get("reference")), *(metric(values.get(runtime)) for runtime in runtimes))
        for name, values in report.metrics.items()
    ]
    return _table(("metric", "float", *(RUNTIMES[name] for name in runtimes)), rows, "l" + "r" * (len(runtimes) + 1))


def _sizes(report: Report) -> str:
    whole = report.sizes.float_parameters
    rows = [
        (_code(name), size(bytes_), percent(bytes_ / whole) if whole else NONE)
        for name, bytes_ in sorted(report.sizes.files.items())
    ]
    return _table(("file", "size", "of float"), rows, "lrr")


def _layers(report: Report) -> str:
    shown = worst_layers(report, WORST_LAYERS)
    rows = [
        (
            _code(layer.name),
            layer.format,
            f"{layer.bits_per_weight:.2f}",
            decibels(layer.weight_sqnr_db),
            decibels(layer.output_sqnr_db.own),
            decibels(layer.output_sqnr_db.worst),
            _text(layer.kernel or NONE),
            short(layer.stage) or NONE,
            ", ".join(dict.fromkeys(cause.kind for cause in layer.causes)) or NONE,
        )
        for layer in shown
    ]
    headings = ("layer", "format", "bits", "weight dB", "own dB", "network dB", "kernel", "stage", "likely causes")
    known = sum(layer_sqnr(layer) is not None for layer in report.layers)
    title = f"**Worst layers** ({len(shown)} of {known})"
    used = ", ".join(f"{name} {number}" for name, number in kernels(report.layers).items())
    parts = [title, _table(headings, rows, "llrrrrlll")] if rows else []
    lost = loss_by_stage(report)
    parts += [f"Where the accuracy went: {_cell(_text(lost))}"] if lost else []
    parts += [f"Kernels: {_cell(_text(used))}"] if used else []
    return "\n\n".join(parts + _forms(report))


def _forms(report: Report) -> list[str]:
    """How the weights are stored, and why so."""
    found = collections.Counter((layer.format, layer.why) for layer in report.layers if layer.why)
    lines = [
        f"- {_cell(_text(form))} ({plural(count, 'layer')}): {_cell(_text(why))}"
        for (form, why), count in found.most_common()
    ]
    return ["Weights:", "\n".join(lines)] if lines else []


def _sensitivity(report: Report) -> str:
    rows = [(_code(name), *figures) for name, *figures in sensitivity_rows(report, WORST_LAYERS)]
    headings = sensitivity_headings(report)
    return _table(headings, rows, "l" + "r" * (len(headings) - 1))


def _passes(report: Report) -> str:
    rows = [
        (
            _code(entry.name) + (" (inserted)" if entry.inserted else ""),
            ", ".join(f"{key}={plain(value)}" for key, value in entry.options.items()),
            str(len(entry.changed)),
            str(len(entry.skipped)),
            ", ".join(f"{key} {measured(value)}" for key, value in entry.measured.items()),
        )
        for entry in report.passes
    ]
    table = _table(("pass", "options", "changed", "skipped", "measured"), rows, "llrrl")
    if not table:
        return ""
    skipped = [line for entry in report.passes for line in _skips(entry)]
    more = [f"- and {len(skipped) - SKIPS_SHOWN} more in report.json"] if len(skipped) > SKIPS_SHOWN else []
    listed = "\n".join(skipped[:SKIPS_SHOWN] + more)
    title = f"{plural(len(rows), 'pass', 'passes')}, {plural(len(skipped), 'node')} skipped"
    inside = "\n\n".join(part for part in (table, listed) if part)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def _skips(entry: PassRecordView) -> list[str]:
    return [f"- {_code(entry.name)} left {_code(skip.node)}: {_cell(_text(skip.why))}" for skip in entry.skipped]


def _repeat(report: Report) -> str:
    environment = ", ".join(f"{key} {plain(value)}" for key, value in report.environment.items())
    source = ", ".join(f"{key} {plain(value)}" for key, value in report.calibration.items())
    lines = [f"```\n{command(report)}\n```"]
    lines += ["with the rules per layer of `recipe.layers` in report.json"] if report.recipe.get("layers") else []
    lines += [f"Calibration: {_cell(_text(source))}"] if source else []
    lines += [f"Made with {_cell(_text(environment))}"] if environment else []
    engine = ", ".join(f"{key} {plain(report.engine[key])}" for key in ENGINE_FIGURES if key in report.engine)
    lines += [f"TensorRT engine: {_cell(_text(engine))}"] if engine else []
    return "\n\n".join(["**Repeat**", *lines])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    if not rows:
        return ""
    rule = [{"l": "---", "r": "---:"}[side] for side in align]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (headings, rule, *rows[:ROWS_SHOWN])]
    more = [f"\n{len(rows) - ROWS_SHOWN} more in report.json"] if len(rows) > ROWS_SHOWN else []
    return "\n".join([*lines, *more])


def _cell(value: object) -> str:
    """On one line that cannot end a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _text(value: object) -> str:
    """Words, none of which begins an element of HTML. Not for what stands in backticks."""
    return str(value).replace("<", "&lt;")


def _code(text: str) -> str:
    """Text as it stands, of at most CELL_WIDTH characters. Backticks, which would end it, become apostrophes."""
    return f"`{shorten(text, CELL_WIDTH).replace('`', chr(39))}`"


def _bold(state: str) -> str:
    return state if state == "passed" else f"**{state}**"

"""The most sensitive layers, and what --budget chose, as rows for the terminal and for markdown."""

from exporter.render.text import decibels, metric
from exporter.report import LayerSensitivity, Report


def sensitivity_headings(report: Report) -> tuple[str, ...]:
    """Of the columns of `sensitivity_rows`: a metric's are named after it."""
    return ("most sensitive layers", "alone dB", "all but it dB", "gain dB", *_metric_columns(report))


def sensitivity_rows(report: Report, limit: int) -> list[tuple[str, ...]]:
    """The first `limit` layers: their name, the three figures in dB, and each metric alone and without."""
    return [_row(layer) for layer in report.sensitivity[:limit]]


def budget_line(report: Report) -> str:
    """How many layers --budget gave which width; empty without one."""
    if report.budget is None:
        return ""
    chosen = [layer.chosen for layer in report.budget.layers]
    counts = {name: chosen.count(name) for name in ("3", "4", "8", "float") if name in chosen}
    written = [
        f"{number} in float" if name == "float" else f"{number} at {name} bits" for name, number in counts.items()
    ]
    return f"budget {report.budget.terms}: {'met' if report.budget.met else 'NOT MET'}, layers: {', '.join(written)}"


def _metric_columns(report: Report) -> list[str]:
    names = report.sensitivity[0].metrics if report.sensitivity else ()
    return [column for name in names for column in (f"{name} alone", f"{name} without")]


def _row(layer: LayerSensitivity) -> tuple[str, ...]:
    metrics = [metric(values.get(kind)) for values in layer.metrics.values() for kind in ("alone", "without")]
    gain = f"{layer.gain_db:+.2f}"
    return layer.name, decibels(layer.alone_sqnr_db), decibels(layer.without_sqnr_db), gain, *metrics

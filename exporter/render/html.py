"""A report as one page of HTML that opens anywhere: no network, no server, light and dark.

The page says everything as text; its script adds sorting, filters and plots, drawn by uPlot, which lies beside the
template and is embedded. A content security policy lets the embedded scripts run, by their hashes, and nothing load.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from exporter.causes import worth_a_look
from exporter.metrics import EXACT_DB
from exporter.render.text import (
    FIGURES,
    NONE,
    RUNTIMES,
    command,
    comparisons,
    count,
    decibels,
    gate_state,
    headline,
    kernels,
    loss_by_stage,
    measured,
    metric,
    numbers_that_matter,
    percent,
    plain,
    plural,
    size,
    verdict,
)
from exporter.report import LayerDiff, Report
from exporter.stages import describe, short

LOWEST_DB, HIGHEST_DB = -20.0, 120.0
"""What the chart spans at most: an exact or a broken layer would flatten all others."""


def render(report: Report, timings: Mapping[str, Any]) -> str:
    """The page; `timings` is what timings.json holds."""
    scripts = {"library": _asset("uPlot.iife.min.js"), "script": _asset("report.js")}
    return _template().render(
        **scripts,
        hashes=[_hash(text) for text in scripts.values()],
        licence=_asset("uPlot.LICENSE"),
        style=_asset("uPlot.min.css") + _asset("report.css"),
        name=str(report.model.get("name", "model")),
        verdict=verdict(report),
        state=_state(report),
        headline=headline(report),
        numbers=numbers_that_matter(report, timings),
        warnings=report.warnings,
        gates=[(gate.expr, metric(gate.value), gate_state(gate), gate.where) for gate in report.gates],
        figures=[name for name, _ in FIGURES],
        comparisons=_comparisons(report),
        metrics=_metrics(report),
        sizes=_sizes(report),
        latency=_latency(timings),
        layers=[_row(index, layer) for index, layer in enumerate(report.layers)],
        kinds=sorted({cause.kind for layer in report.layers for cause in layer.causes}),
        kernels=kernels(report.layers),
        lost=loss_by_stage(report),
        worst=[_worst(index, layer) for index, layer in _worth_a_look(report)],
        passes=report.passes,
        measured=measured,
        plain=plain,
        plural=plural,
        environment=report.environment,
        calibration=report.calibration,
        seconds=timings.get("seconds", {}),
        command=command(report),
        rules=report.recipe.get("layers"),
        data=_data(report),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_asset("report.html"))


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("exporter.render") / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's text as the policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _state(report: Report) -> str:
    """The class of the verdict: good, bad, or open when nothing failed but not all is known."""
    if any(gate.measured and not gate.passed for gate in report.gates):
        return "bad"
    return "good" if report.gates and report.gates_passed else "open"


def _comparisons(report: Report) -> dict[str, list[tuple[str, ...]]]:
    return {
        against: [(name, *(read(figures) for _, read in FIGURES)) for name, figures in rows]
        for against, rows in comparisons(report).items()
        if rows
    }


def _metrics(report: Report) -> list[tuple[str, ...]]:
    """A row of headings, then one for each metric."""
    runtimes = [name for name in RUNTIMES if any(name in values for values in report.metrics.values())]
    rows = [
        (name, *(metric(values.get(runtime)) for runtime in ("reference", *runtimes)))
        for name, values in report.metrics.items()
    ]
    return [("metric", "float", *(RUNTIMES[name] for name in runtimes)), *rows] if rows else []


def _sizes(report: Report) -> list[tuple[str, str, str]]:
    whole = report.sizes.float_parameters
    return [
        (name, size(written), percent(written / whole) if whole else NONE)
        for name, written in sorted(report.sizes.files.items())
    ]


def _latency(timings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(timing["batch"]),
            f"{1000 * timing['float_s']:.3f}",
            f"{1000 * timing['quantized_s']:.3f}",
            f"{timing['float_s'] / timing['quantized_s']:.2f}",
        )
        for timing in timings.get("latency", {}).get("timings", [])
    ]


def _row(index: int, layer: LayerDiff) -> dict[str, Any]:
    """A layer's line of the table: (text, what to sort by) of each figure."""
    output = layer.output_sqnr_db
    return {
        "index": index,
        "name": layer.name,
        "kind": layer.kind,
        "format": layer.format,
        "kernel": layer.kernel or "",
        "stage": short(layer.stage),
        "causes": list(dict.fromkeys(cause.kind for cause in layer.causes)),
        "figures": [
            (f"{layer.bits_per_weight:.2f}", layer.bits_per_weight),
            (count(layer.params), layer.params),
            *((decibels(value), value) for value in (layer.weight_sqnr_db, output.own, output.worst)),
            (decibels(output.onnxruntime_vs_eager_quantized), output.onnxruntime_vs_eager_quantized),
        ],
    }


def _worth_a_look(report: Report) -> list[tuple[int, LayerDiff]]:
    """(place in the network, layer), the worst in the network first."""
    names = worth_a_look(report.layers)
    chosen = [(index, layer) for index, layer in enumerate(report.layers) if layer.name in names]
    return sorted(chosen, key=lambda entry: entry[1].output_sqnr_db.worst or 0.0)


def _worst(index: int, layer: LayerDiff) -> dict[str, Any]:
    return {
        "name": layer.name,
        "index": index,
        "sqnr": decibels(layer.output_sqnr_db.worst),
        "facts": _facts(layer),
        "causes": layer.causes,
    }


def _facts(layer: LayerDiff) -> str:
    """What the panel and the list of the worst say of a layer in one line."""
    stage = f". Loss: {describe(layer.stage)}" if layer.stage is not None else ""
    own, weight = decibels(layer.output_sqnr_db.own), decibels(layer.weight_sqnr_db)
    return (
        f"{layer.kind}, {layer.format}, {layer.bits_per_weight:.2f} bits; alone {own} dB, its weight {weight} dB{stage}"
    )


def _data(report: Report) -> dict[str, Any]:
    """What the script plots: a column a series, in network order."""
    layers = report.layers
    return {
        "names": [layer.name for layer in layers],
        "network": [_plotted(layer.output_sqnr_db.worst) for layer in layers],
        "own": [_plotted(layer.output_sqnr_db.own) for layer in layers],
        "weight": [_plotted(layer.weight_sqnr_db) for layer in layers],
        "bits": [round(layer.bits_per_weight, 3) for layer in layers],
        "facts": [_facts(layer) for layer in layers],
        "causes": [[[cause.kind, cause.why] for cause in layer.causes] for layer in layers],
        "histograms": {
            name: {
                kind: [bins.low, bins.high, list(bins.before), list(bins.after)] for kind, bins in sorted(kinds.items())
            }
            for name, kinds in report.histograms.items()
        },
    }


def _plotted(value: float | None) -> float | None:
    """Decibels as far as the chart goes; an exact layer leaves a gap."""
    if value is None or value >= EXACT_DB:
        return None
    return round(min(HIGHEST_DB, max(LOWEST_DB, value)), 2)

"""What every rendering says in the same words: the verdict, figures as text, which layers to look at first."""

import collections
import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from exporter.gates import FILES
from exporter.metrics import EXACT_DB, WORST, Figures
from exporter.report import GateResult, Json, LayerDiff, Report
from exporter.stages import is_fault, own_stage, source

NONE = "-"

FIGURES: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("SQNR dB", lambda figures: decibels(figures.sqnr_db)),
    ("cosine", lambda figures: f"{figures.cosine:.5f}"),
    ("max error", lambda figures: magnitude(figures.max_abs)),
    ("mean error", lambda figures: magnitude(figures.mean_abs)),
    ("top-1", lambda figures: percent(figures.top1_agreement)),
    ("KL", lambda figures: magnitude(figures.kl)),
)
"""Columns of a comparison: heading, and how a figure reads."""

RUNTIMES = {
    "eager_quantized": "quantized eager",
    "onnxruntime": "onnxruntime",
    "onnxruntime_unoptimized": "onnxruntime, unoptimized",
    "tensorrt": "TensorRT",
    "tensorrt_dialect": "TensorRT's file",
    "tensorrt_16_bit": "TensorRT's file, 16-bit",
    "float16": "float model in float16",
    "bfloat16": "float model in bfloat16",
}


SHIPPED = ("onnxruntime", "tensorrt")
TENSORRT = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}
"""Runtimes of artifacts, the one to speak of first."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A figure of the first line, what it is, and what stands behind it."""

    value: str
    label: str
    note: str


def verdict(report: Report) -> str:
    """One line: how the gates stand."""
    failed = sum(gate.measured and not gate.passed for gate in report.gates)
    unmeasured = sum(not gate.measured for gate in report.gates)
    if not report.gates:
        return "done, no gates set"
    if failed:
        return f"{failed} of {plural(len(report.gates), 'gate')} failed"
    if unmeasured:
        return f"{unmeasured} of {plural(len(report.gates), 'gate')} could not be measured"
    return "passed its gate" if len(report.gates) == 1 else f"passed all {len(report.gates)} gates"


def gate_state(gate: GateResult) -> str:
    """passed, FAILED or not measured."""
    if not gate.measured:
        return "not measured"
    return "passed" if gate.passed else "FAILED"


def headline(report: Report) -> str:
    """What was made: parameters, average bits per weight, size of the largest artifact beside float."""
    parts = []
    params = sum(layer.params for layer in report.layers)
    if params:
        bits = sum(layer.bits_per_weight * layer.params for layer in report.layers) / params
        parts.append(f"{count(params)} weights at {bits:.2f} bits")
    if report.sizes.float_parameters:
        parts.append(f"float {size(report.sizes.float_parameters)}")
    return ", ".join(parts)


def numbers_that_matter(report: Report, timings: Mapping[str, Any]) -> tuple[Number, ...]:
    """Accuracy, size and speed against float; `timings` is what timings.json holds."""
    return _accuracy(report), _size(report), _speed(timings)


def _accuracy(report: Report) -> Number:
    """The first metric of the user's own, or how far the outputs are."""
    figures = [figures for outputs in report.outputs.values() for figures in outputs.values()]
    sqnr = f"{decibels(min((entry.sqnr_db for entry in figures), default=None))} dB"
    agreements = [entry.top1_agreement for entry in figures if entry.top1_agreement is not None]
    top1 = f"top-1 agreement {percent(min(agreements))}" if agreements else ""
    for name, values in report.metrics.items():
        shown = next((values[run] for run in (*SHIPPED, "eager_quantized") if values.get(run) is not None), None)
        if shown is not None:
            note = ", ".join(filter(None, (f"SQNR {sqnr}", top1)))
            return Number(f"{metric(values.get('reference'))} → {metric(shown)}", f"{name}, float → quantized", note)
    return Number(sqnr if figures else NONE, "SQNR of the worst output against float", top1)


def _size(report: Report) -> Number:
    files = report.sizes.files
    sizes = [sum(files.get(name, 0) for name in FILES[runtime]) for runtime in SHIPPED]
    largest, whole = max(sizes), report.sizes.float_parameters
    if not largest or not whole:
        return Number(NONE, "of the float size", "")
    return Number(f"{100 * largest / whole:.1f} %", "of the float size", f"{size(largest)} instead of {size(whole)}")


def _speed(timings: Mapping[str, Any]) -> Number:
    latency = timings.get("latency", {})
    ratios = sorted(timing["float_s"] / timing["quantized_s"] for timing in latency.get("timings", []))
    if not ratios:
        return Number(NONE, "speed against float", "not measured: run qexport bench on the output folder")
    ends = dict.fromkeys(f"{ratio:.2f}x" for ratio in (ratios[0], ratios[-1]))
    batches = " and ".join(str(timing["batch"]) for timing in latency["timings"])
    where = ran_in(latency["runtime"], latency["threads"])
    return Number(" to ".join(ends), "as fast as float", f"{batches} samples at once, {where}")


def ran_in(runtime: str, threads: int | None) -> str:
    """Where a latency was measured: onnxruntime with its threads, or TensorRT of a flavor."""
    if runtime != "onnxruntime":
        return f"{TENSORRT[runtime]}, inputs and outputs on the GPU"
    return plural(threads, "thread") if threads else "onnxruntime's own number of threads"


def command(report: Report) -> str:
    """The command line that makes this report again; rules per layer are not on it."""
    words = ["qexport", str(report.model.get("name", "MODEL"))]
    for key, value in report.recipe.items():
        words += _flag(key, value)
    return shlex.join(words)


def _flag(key: str, value: Json) -> list[str]:
    """An entry of the recipe as the command line spells it; what has no flag (rules per layer) is left out."""
    flag = f"--{key.replace('_', '-')}"
    if value is None or value is False or value == "" or isinstance(value, dict):
        return []
    if value is True:
        return [flag]
    if not isinstance(value, list):
        return [flag, str(value)]
    if any(isinstance(entry, dict) for entry in value):
        return []
    if key == "passes":
        return [flag, ",".join(map(str, value))]
    return [word for entry in value for word in (flag, str(entry))]


def plain(value: Json) -> str:
    """A value of the recipe, an option or an environment as text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def measured(value: float | str) -> str:
    """A figure that a pass measured."""
    return value if isinstance(value, str) else f"{value:.4g}"


def worst_layers(report: Report, limit: int) -> tuple[LayerDiff, ...]:
    """Layers by the SQNR of their output (in the network, else own, else of the weight), lowest first."""
    measured = [(layer_sqnr(layer), layer) for layer in report.layers]
    known = [(value, layer) for value, layer in measured if value is not None]
    return tuple(layer for _, layer in sorted(known, key=lambda pair: pair[0])[:limit])


def layer_sqnr(layer: LayerDiff) -> float | None:
    """The figure a layer is judged by."""
    output = layer.output_sqnr_db
    return next((value for value in (output.worst, output.own, layer.weight_sqnr_db) if value is not None), None)


def comparisons(report: Report) -> dict[str, list[tuple[str, Figures]]]:
    """{against what: (run and output, figures) of each}."""
    return {
        "against float": [*_rows(report.cast), *_rows(report.outputs)],
        "against quantized eager": _rows(report.parity),
    }


def _rows(runs: Mapping[str, Mapping[str, Figures]]) -> list[tuple[str, Figures]]:
    rows = []
    for run, outputs in runs.items():
        for output, figures in outputs.items():
            name = RUNTIMES.get(run, run)
            rows.append((name if len(outputs) == 1 else f"{name}: {output}", figures))
    return rows


def loss_by_stage(report: Report) -> str:
    """One line: where to look first, and how many layers have most of their noise from which stage; "" if unknown."""
    first = source(report.layers)
    if first is None or first.stage is None:
        return ""
    stage = own_stage(first.stage)
    counts = collections.Counter(layer.stage.name for layer in report.layers if layer.stage is not None)
    listed = ", ".join(f"{name} {number}" for name, number in counts.most_common())
    what = "first fault" if is_fault(first.stage) else "most noise of one layer"
    return f"{what}: {stage} at {first.name}, {decibels(first.stage.own.get(stage))} dB; layers by stage: {listed}"


def kernels(layers: Iterable[LayerDiff]) -> dict[str, int]:
    """{kernel: layers that run on it}, most used first."""
    counts: dict[str, int] = {}
    for layer in layers:
        if layer.kernel is not None:
            counts[layer.kernel] = counts.get(layer.kernel, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def decibels(value: float | None) -> str:
    """One decimal; the ends of the scale by name."""
    if value is None:
        return NONE
    if abs(value) >= EXACT_DB:
        return "exact" if value > 0 else "broken"
    return f"{value:.1f}"


def magnitude(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return NONE
    return "unbounded" if value >= WORST else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else f"{100 * value:.2f} %"


def metric(value: float | None) -> str:
    """A figure of the user's own, at full width: its unit is not known."""
    return NONE if value is None else f"{value:.6g}"


def size(value: int) -> str:
    """Bytes in the unit that keeps three digits (powers of 1000)."""
    if value < 1000:
        return f"{value} B"
    scaled = float(value)
    for unit in ("kB", "MB", "GB"):
        scaled /= 1000
        if scaled < 999.5 or unit == "GB":
            return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"
    raise AssertionError("unreachable: the last unit returns")


def count(value: int) -> str:
    """A number of things: 4.2 M."""
    for factor, unit in ((1_000_000_000, " G"), (1_000_000, " M"), (1_000, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return str(value)


def shorten(name: str, width: int) -> str:
    """At most `width` characters: the middle goes, because both ends tell layers apart."""
    if len(name) <= width:
        return name
    head = (width - 2) // 2
    return f"{name[:head]}..{name[len(name) - (width - 2 - head) :]}"


def plural(number: int, word: str, many: str = "") -> str:
    """1 gate, 2 gates; `many` is the plural of a word that takes more than an s."""
    return f"{number} {word}" if number == 1 else f"{number} {many or word + 's'}"

"""Gates: what a result must reach, as `SUBJECT OP NUMBER` with >=, <=, >, < or ==.

    sqnr_db>=20   cosine, max_abs, mean_abs, top1_agreement, kl     figures of the outputs, see `exporter.metrics`
    size_ratio<=0.3                        bytes of the largest artifact / bytes of the float parameters
    metric.accuracy>=0.9                   a figure of --eval
    metric.accuracy.drop<=0.01             reference - value: points lost, where higher is better
    metric.perplexity.rise<=0.5            value - reference, where lower is better
    metric.perplexity.ratio<=1.01          value / reference
    onnxruntime.max_abs<=0.1               any of them of one runtime: eager_quantized, onnxruntime, tensorrt
    layer.output_sqnr_db>=15               of every layer, the lower of eager torch and the file, against float;
                                           also weight_sqnr_db, cosine, max_abs, bits_per_weight

Every runtime that ran (unless one is named), every output and every layer that has the figure must pass; the verdict
shows the one that is furthest from passing. A figure that nobody measured has not passed.
"""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping

from exporter.errors import InputError
from exporter.report import GateResult, LayerDiff, Report

RUNTIMES = ("eager_quantized", "onnxruntime", "tensorrt")
FIGURES = ("sqnr_db", "cosine", "max_abs", "mean_abs", "top1_agreement", "kl")
SIZE = "size_ratio"
METRIC = "metric"
LAYER = "layer"
LAYER_FIGURES: Mapping[str, Callable[[LayerDiff], float | None]] = {
    "output_sqnr_db": lambda layer: layer.output_sqnr_db.worst,
    "weight_sqnr_db": lambda layer: layer.weight_sqnr_db,
    "cosine": lambda layer: layer.cosine,
    "max_abs": lambda layer: layer.max_abs,
    "bits_per_weight": lambda layer: layer.bits_per_weight,
}
CHANGES: Mapping[str, Callable[[float, float], float | None]] = {
    "drop": lambda reference, value: reference - value,
    "rise": lambda reference, value: value - reference,
    "ratio": lambda reference, value: value / reference if reference else None,
}
RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
FILES: Mapping[str, tuple[str, ...]] = {
    "eager_quantized": ("model.safetensors",),
    "onnxruntime": ("model.onnx", "model.onnx.data"),
    "tensorrt": ("model.engine",),
}
"""The files a runtime loads; the checkpoint counts only when eager_quantized is named."""

GATE_FAILED = 3
NOT_MEASURED = 4


class GateSyntaxError(InputError):
    """A gate that does not parse."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """A parsed gate; `runtime` None stands for all that ran, `metric` and `change` belong to figures of --eval.

    `layer` is the figure of LAYER_FIGURES where every layer is meant.
    """

    expr: str
    figure: str
    relation: str
    bound: float
    runtime: str | None = None
    metric: str | None = None
    change: str | None = None
    layer: str | None = None


def parse_gate(expr: str) -> Gate:
    """Read `SUBJECT OP NUMBER`. Raises GateSyntaxError that names the nearest known subject."""
    text = "".join(expr.split())
    subject, relation, bound = split_gate(expr, "sqnr_db>=20")
    head, _, rest = subject.partition(".")
    runtime, figure = (head, rest) if head in RUNTIMES and rest else (None, subject)
    if figure in (*FIGURES, SIZE):
        return Gate(text, figure, relation, bound, runtime)
    if head == LAYER and rest in LAYER_FIGURES:
        return Gate(text, LAYER, relation, bound, layer=rest)
    kind, _, metric = figure.partition(".")
    if kind != METRIC or not metric:
        raise GateSyntaxError(f"unknown figure {subject!r}", where="--gate", fix=_nearest(subject))
    name, _, last = metric.rpartition(".")
    change = last if name and last in CHANGES else None
    return Gate(text, METRIC, relation, bound, runtime, name if change else metric, change)


def split_gate(expr: str, example: str) -> tuple[str, str, float]:
    """(subject, relation, bound) of `SUBJECT OP NUMBER`, the subject not looked at. Raises GateSyntaxError."""
    match = re.fullmatch(r"([^<>=!]+)(>=|<=|==|>|<)([^<>=!]+)", "".join(expr.split()))
    if match is None:
        fix = f"write SUBJECT OP NUMBER, for example {example}"
        raise GateSyntaxError(f"{expr!r} is not a gate", where="--gate", fix=fix)
    subject, relation, number = match.groups()
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise GateSyntaxError(f"{number!r} in {expr!r} is not a finite number", where="--gate")
    return subject, relation, bound


def evaluate(gates: Iterable[Gate], report: Report) -> tuple[GateResult, ...]:
    """The verdict on every gate from the report's figures."""
    return tuple(_evaluate(gate, report) for gate in gates)


def judge_layers(gate: Gate, report: Report) -> dict[str, GateResult]:
    """{layer: verdict} of a gate on layers, of those that have the figure; {} for another gate."""
    return {
        name: judge(gate.expr, gate.relation, gate.bound, {name: value})
        for name, value in _layers(gate, report).items()
        if value is not None
    }


def exit_code(results: Iterable[GateResult]) -> int:
    """0 when all passed, 3 when a gate failed, else 4 when a figure was not measured."""
    verdicts = tuple(results)
    if any(result.measured and not result.passed for result in verdicts):
        return GATE_FAILED
    return 0 if all(result.passed for result in verdicts) else NOT_MEASURED


def _evaluate(gate: Gate, report: Report) -> GateResult:
    figures = _figures(gate, report)
    return judge(gate.expr, gate.relation, gate.bound, figures, unmeasured=gate.runtime or "")


def judge(
    expr: str, relation: str, bound: float, figures: Mapping[str, float | None], unmeasured: str = ""
) -> GateResult:
    """The verdict on {where: figure}: the one furthest from passing decides. `unmeasured` names where none is."""
    measured = {where: value for where, value in figures.items() if value is not None}
    if not measured:
        return GateResult(expr, None, passed=False, measured=False, where=unmeasured)
    where = min(measured, key=lambda name: margin(relation, bound, measured[name]))
    return GateResult(expr, measured[where], passed=RELATIONS[relation](measured[where], bound), where=where)


def margin(relation: str, bound: float, value: float) -> float:
    """How far inside the bound a value lies; negative outside."""
    if relation == "==":
        return -abs(value - bound)
    return value - bound if relation.startswith(">") else bound - value


def _figures(gate: Gate, report: Report) -> dict[str, float | None]:
    """{where: figure} for all that the gate speaks of."""
    runtimes = RUNTIMES if gate.runtime is None else (gate.runtime,)
    if gate.figure == SIZE:
        return size_ratios(runtimes if gate.runtime else ("onnxruntime", "tensorrt"), report)
    if gate.figure == METRIC:
        return _metrics(gate, runtimes, report)
    if gate.figure == LAYER:
        return _layers(gate, report)
    return {
        f"{runtime} {output}": getattr(figures, gate.figure)
        for runtime in runtimes
        for output, figures in report.outputs.get(runtime, {}).items()
    }


def size_ratios(runtimes: Iterable[str], report: Report) -> dict[str, float | None]:
    """{runtime: bytes of the files it loads / bytes of the float parameters} of those that were made."""
    ratios: dict[str, float | None] = {}
    for runtime in runtimes:
        sizes = [report.sizes.files[name] for name in FILES[runtime] if name in report.sizes.files]
        if sizes and report.sizes.float_parameters:
            ratios[runtime] = sum(sizes) / report.sizes.float_parameters
    return ratios


def _layers(gate: Gate, report: Report) -> dict[str, float | None]:
    """{layer: figure}; {} for a gate on something else."""
    return {layer.name: LAYER_FIGURES[gate.layer](layer) for layer in report.layers} if gate.layer else {}


def _metrics(gate: Gate, runtimes: Iterable[str], report: Report) -> dict[str, float | None]:
    values = report.metrics.get(gate.metric or "", {})
    measured = {runtime: value for runtime in runtimes if (value := values.get(runtime)) is not None}
    if gate.change is None:
        return dict(measured)
    reference = values.get("reference")
    if reference is None:
        return {}
    return {runtime: CHANGES[gate.change](reference, value) for runtime, value in measured.items()}


def _nearest(subject: str) -> str:
    known = [*FIGURES, SIZE, *(f"{METRIC}.NAME.{change}" for change in CHANGES)]
    known += [f"{runtime}.{figure}" for runtime in RUNTIMES for figure in known]
    known += [f"{LAYER}.{figure}" for figure in LAYER_FIGURES]
    near = difflib.get_close_matches(subject, known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known are {', '.join([*FIGURES, SIZE])}, metric.NAME, layer.{next(iter(LAYER_FIGURES))}"
    )

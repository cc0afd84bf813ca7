"""Gates on differences: what a new report may lose against an old one, as `SUBJECT OP NUMBER`.

    sqnr_db.drop<=0.5                   a figure of the outputs: old - new; .rise is new - old, .ratio new / old
    onnxruntime.max_abs.rise<=0.01      of one runtime: eager_quantized, onnxruntime, tensorrt
    size_ratio.rise<=0.05               bytes of the artifact / bytes of the float parameters
    metric.accuracy.drop<=0.01          a figure of --eval, runtime by runtime
    layer.output_sqnr_db.drop<=3        of every layer; also weight_sqnr_db, cosine, max_abs, bits_per_weight
    regressions==0                      outputs' SQNR and top-1 agreement that are worse by more than chance
    layer.regressions<=2                layers whose output's SQNR is

Every runtime, output and layer that is in both reports must pass. All but the last two compare numbers as they stand.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from exporter.diff import Change, ReportDiff
from exporter.gates import (
    CHANGES,
    FIGURES,
    LAYER,
    LAYER_FIGURES,
    METRIC,
    RUNTIMES,
    SIZE,
    GateSyntaxError,
    judge,
    size_ratios,
    split_gate,
)
from exporter.options import nearest
from exporter.report import GateResult, Report

REGRESSIONS = "regressions"
EXAMPLE = "sqnr_db.drop<=0.5"


@dataclasses.dataclass(frozen=True)
class DiffGate:
    """A gate on a difference. `scope` is a runtime, layer, or "" for all runtimes; `change` "" counts regressions."""

    expr: str
    scope: str
    figure: str
    change: str
    relation: str
    bound: float


def parse_diff_gate(expr: str) -> DiffGate:
    """Read a gate on a difference. Raises GateSyntaxError that names the nearest known subject."""
    subject, relation, bound = split_gate(expr, EXAMPLE)
    text = "".join(expr.split())
    if subject in (REGRESSIONS, f"{LAYER}.{REGRESSIONS}"):
        return DiffGate(text, subject.removesuffix(REGRESSIONS).rstrip("."), REGRESSIONS, "", relation, bound)
    path, _, change = subject.rpartition(".")
    head, _, rest = path.partition(".")
    scope, figure = (head, rest) if head in (*RUNTIMES, LAYER) and rest else ("", path)
    known = LAYER_FIGURES if scope == LAYER else (*FIGURES, SIZE)
    if change not in CHANGES or not (figure in known or (scope != LAYER and _metric_of(figure))):
        raise GateSyntaxError(f"unknown difference {subject!r}", where="--gate", fix=_nearest(subject))
    return DiffGate(text, scope, figure, change, relation, bound)


def evaluate_diff(gates: Sequence[DiffGate], old: Report, new: Report, found: ReportDiff) -> tuple[GateResult, ...]:
    """The verdict on every gate; `found` is what `diff_reports` makes of the two."""
    return tuple(_judge(gate, old, new, found) for gate in gates)


def _nearest(subject: str) -> str:
    subjects = [f"{name}.{end}" for name in (*FIGURES, SIZE, f"{METRIC}.NAME") for end in CHANGES]
    subjects += [f"{LAYER}.{name}.{end}" for name in LAYER_FIGURES for end in CHANGES]
    fix = nearest(subject, [*subjects, REGRESSIONS, f"{LAYER}.{REGRESSIONS}"])
    return fix if fix.startswith("did you") else f"write for example {EXAMPLE}"


def _metric_of(figure: str) -> str:
    """The metric's name in `metric.NAME`; empty for another figure."""
    kind, _, name = figure.partition(".")
    return name if kind == METRIC else ""


def _judge(gate: DiffGate, old: Report, new: Report, found: ReportDiff) -> GateResult:
    if gate.figure == REGRESSIONS:
        figures = _count_regressions(gate, found)
    else:
        before, after = _values(gate, old), _values(gate, new)
        figures = {
            where: CHANGES[gate.change](value, after[where]) for where, value in before.items() if where in after
        }
    return judge(gate.expr, gate.relation, gate.bound, figures, unmeasured=gate.scope)


def _count_regressions(gate: DiffGate, found: ReportDiff) -> dict[str, float | None]:
    """Not measured where a change stands without an interval."""
    changes: Sequence[Change] = [change for change in found.outputs if change.figure in ("sqnr_db", "top1_agreement")]
    worse = found.regressions
    if gate.scope == LAYER:
        changes = [layer.sqnr for layer in found.layers if layer.sqnr is not None]
        worse = found.layer_regressions
    if not changes or any(change.verdict == "changed" for change in changes):
        return {}
    return {", ".join(change.where for change in worse[:3]): float(len(worse))}


def _values(gate: DiffGate, report: Report) -> dict[str, float]:
    """{where: figure} of one report."""
    values: dict[str, Any]
    runtimes = (gate.scope,) if gate.scope else RUNTIMES
    metric = _metric_of(gate.figure)
    if gate.scope == LAYER:
        values = {layer.name: LAYER_FIGURES[gate.figure](layer) for layer in report.layers}
    elif gate.figure == SIZE:
        values = size_ratios(runtimes if gate.scope else ("onnxruntime", "tensorrt"), report)
    elif metric:
        values = {runtime: report.metrics.get(metric, {}).get(runtime) for runtime in runtimes}
    else:
        values = {
            f"{runtime} {output}": getattr(figures, gate.figure)
            for runtime in runtimes
            for output, figures in report.outputs.get(runtime, {}).items()
        }
    return {where: value for where, value in values.items() if value is not None}

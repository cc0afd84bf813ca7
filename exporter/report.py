"""The report of one compilation: plain frozen data and its JSON, schema version 1.

    schema_version  1
    model, recipe, environment, calibration   {key: value} as the stages give them
    warnings   [text]
    passes     [{name, options, inserted, changed: [name], skipped: [{node, why}], measured: {figure: value}}]
    layers     [{name, kind, format, bits_per_weight, params, weight_sqnr_db,
                 output_sqnr_db: {own, accumulated, onnxruntime, onnxruntime_vs_eager_quantized},
                 cosine, max_abs, kernel, why, evidence: see Evidence, causes: [{kind, why}],
                 stage: {name, inherited, after: [layer], own, total, typical: {stage: dB}} or null}]
    outputs    {runtime: {output: figures}}          runtimes: eager_quantized, onnxruntime, tensorrt
    parity     {run: {output: figures}}              runs: onnxruntime, onnxruntime_unoptimized, tensorrt,
                                                     tensorrt_dialect (all in float32), tensorrt_16_bit
    metrics    {name: {reference, eager_quantized, onnxruntime, tensorrt}}
    cast       {dtype: {output: figures}}            with --dtype, the float model in it, nothing quantized
    sizes      {float_parameters, files: {name: bytes}}
    gates      [{expr, value, passed, measured, where}]
    sensitivity [{name, alone_sqnr_db, without_sqnr_db, gain_db, metrics: {name: {alone, without}}}]
                with --sensitivity, the most sensitive layer first; see `exporter.sensitivity`
    budget     {terms, met, layers: [{name, chosen, bytes: {option: number}, alone_sqnr_db: {option: number}}]} or null
    sample_sums {outputs: {runtime: {output: sums}}, layers: {layer: sums}}
                sums: {signal: [number], noise: [number], agreement: [number] or null}, an entry for each held-out
                sample, or block of neighbours; see `exporter.sample_sums`
    engine     {flavor, version, engine_bytes, weights_bytes (all constants), scratch_bytes, folded: [layer],
                layer_bytes: {layer: its packed constants}} of a TensorRT engine, or {}
    histograms {layer: {weight | input | output: {low, high, before: [count], after: [count]}}}   of some of the worst

`figures` are those of `exporter.metrics`: {sqnr_db, cosine, max_abs, mean_abs, top1_agreement, kl, nonfinite}.
All compare with the float eager model on held-out samples, except `parity` and `onnxruntime_vs_eager_quantized`, which
compare with the quantized eager model: a low figure there is a fault of the lowering, or arithmetic of the runtime's
own (`onnxruntime` runs as shipped; `onnxruntime_unoptimized` node by node, as the file reads).

A layer's `own` output is fed float inputs, `accumulated` is what it yields in the quantized network; cosine and max_abs
are of `accumulated`. null is "does not apply" or "not measured". No NaN, no infinity, no timing and no path of the
machine is in it; numbers are rounded to SIGNIFICANT digits.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from exporter.metrics import Figures

SCHEMA_VERSION = 1
SIGNIFICANT = 7
"""Digits of a number in the JSON: as many as a float32 holds."""

NUMBERS = re.compile(r"\[\n[-+.0-9eE,\s]+\]")
"""A list of numbers as `json` writes it, one on each line (texts in JSON hold no line breaks); ours stand on one."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
OutputDiff = Figures


@dataclasses.dataclass(frozen=True)
class SkipView:
    """A node that a pass left alone, and why."""

    node: str
    why: str


@dataclasses.dataclass(frozen=True)
class PassRecordView:
    """A pass as it ran; `inserted` when it is there as another's prerequisite."""

    name: str
    options: Mapping[str, Json]
    inserted: bool = False
    changed: tuple[str, ...] = ()
    skipped: tuple[SkipView, ...] = ()
    measured: Mapping[str, float | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerSqnr:
    """SQNR in dB of a layer's output, see the module's docstring; None where not measured."""

    own: float | None = None
    accumulated: float | None = None
    onnxruntime: float | None = None
    onnxruntime_vs_eager_quantized: float | None = None

    @property
    def worst(self) -> float | None:
        """In the network against float, the lower one of eager torch and the file: what the layer is judged by."""
        return min((value for value in (self.accumulated, self.onnxruntime) if value is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What hints at why a layer is far from float; None where it does not apply. See `exporter.evidence`.

    weight_bits, input_bits        width of the codes of one value
    weight_only_db, input_only_db  SQNR of the layer's own output when only its weight, only its input is quantized
    *_outlier_ratio                largest channel's max|value| / the median channel's; *_outlier_channel: which it is
    weight_outlier_axis            what that channel is to the weight: input or output
    *_clipped                      share of values outside the quantizer's range
    *_clip_noise                   share of the quantizer's squared error that those values make
    """

    weight_bits: float | None = None
    input_bits: int | None = None
    weight_only_db: float | None = None
    input_only_db: float | None = None
    weight_outlier_ratio: float | None = None
    weight_outlier_channel: int | None = None
    weight_outlier_axis: str | None = None
    input_outlier_ratio: float | None = None
    input_outlier_channel: int | None = None
    weight_clipped: float | None = None
    weight_clip_noise: float | None = None
    input_clipped: float | None = None
    input_clip_noise: float | None = None


@dataclasses.dataclass(frozen=True)
class Cause:
    """A likely cause of a layer's error, as `exporter.causes` names it, with the figures that speak for it."""

    kind: str
    why: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """Which stage made most of the noise at a layer's output; see `exporter.stages`.

    name       quantization, lowering, runtime, tensorrt dialect
    inherited  most of that noise came in from the layers before
    after      the layers whose outputs it is computed from
    own        {stage: SQNR in dB of the output when the values of the layers before are those without the stage}
    total      {stage: SQNR in dB of the output in the network, with the stage against without it}
    typical    {stage: `own` of a typical row}, for stages that should change nothing
    """

    name: str
    inherited: bool = False
    after: tuple[str, ...] = ()
    own: Mapping[str, float] = dataclasses.field(default_factory=dict)
    total: Mapping[str, float] = dataclasses.field(default_factory=dict)
    typical: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of equal bins over [low, high], of the float values and of what quantization made of them."""

    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerDiff:
    """A layer with a weight: how it is stored, how far it is from float, and the runtime's kernel where known.

    kind             linear, conv, conv_transpose, embedding
    format           of the stored weight: float32, int8_channel, int4_group, ...
    bits_per_weight  bytes really stored (codes, scales, zero points) * 8 / params
    params           entries of the weight
    why              the reason for that format, where there was a choice
    """

    name: str
    kind: str
    format: str
    bits_per_weight: float
    params: int
    weight_sqnr_db: float | None = None
    output_sqnr_db: LayerSqnr = LayerSqnr()
    cosine: float | None = None
    max_abs: float | None = None
    kernel: str | None = None
    evidence: Evidence | None = None
    causes: tuple[Cause, ...] = ()
    why: str = ""
    stage: Stage | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes: of the float parameters, and of each file written."""

    float_parameters: int
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What each held-out sample (or block of samples) adds to a comparison; see `exporter.sample_sums`."""

    signal: tuple[float, ...]
    noise: tuple[float, ...]
    agreement: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class AllSums:
    """{runtime: {output: sums}} against the float model, {layer: sums} of `accumulated` against the float twin."""

    outputs: Mapping[str, Mapping[str, Sums]] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, Sums] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone costs, and what leaving it alone in float gives; see `exporter.sensitivity`."""

    name: str
    alone_sqnr_db: float
    without_sqnr_db: float
    gain_db: float
    metrics: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BudgetLayer:
    """What --budget chose for a layer: `float` or a width; and of each option bytes and SQNR of the output alone."""

    name: str
    chosen: str
    bytes: Mapping[str, int]
    alone_sqnr_db: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Budget:
    """The terms of --budget, whether a choice was found that meets them, and the choice; see `exporter.budget`."""

    terms: str
    met: bool
    layers: tuple[BudgetLayer, ...]


@dataclasses.dataclass(frozen=True)
class GateResult:
    """A gate's verdict: the figure that came closest to failing, and where (runtime, output) it was found."""

    expr: str
    value: float | None
    passed: bool
    measured: bool = True
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a compilation says about its result."""

    model: Mapping[str, Json]
    recipe: Mapping[str, Json]
    environment: Mapping[str, Json]
    calibration: Mapping[str, Json]
    warnings: tuple[str, ...] = ()
    passes: tuple[PassRecordView, ...] = ()
    layers: tuple[LayerDiff, ...] = ()
    outputs: Mapping[str, Mapping[str, OutputDiff]] = dataclasses.field(default_factory=dict)
    parity: Mapping[str, Mapping[str, OutputDiff]] = dataclasses.field(default_factory=dict)
    cast: Mapping[str, Mapping[str, OutputDiff]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    sizes: Sizes = Sizes(float_parameters=0)
    gates: tuple[GateResult, ...] = ()
    sample_sums: AllSums = AllSums()
    sensitivity: tuple[LayerSensitivity, ...] = ()
    budget: Budget | None = None
    histograms: Mapping[str, Mapping[str, Histogram]] = dataclasses.field(default_factory=dict)
    engine: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    @property
    def gates_passed(self) -> bool:
        """True when no gate failed and every gate's figure was measured."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        """JSON text, keys sorted: equal reports give equal bytes. Raises ValueError for a NaN or an infinity."""
        data = {"schema_version": SCHEMA_VERSION, **_fields(self)}
        text = json.dumps(_plain(data, ""), sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
        return NUMBERS.sub(lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report in `text`. Raises ValueError when it is not one, or of another schema version."""
        try:
            data = json.loads(text)
            version = data.pop("schema_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError("not a qexport report") from error
        if version != SCHEMA_VERSION:
            raise ValueError(f"report has schema version {version}, this qexport reads {SCHEMA_VERSION}")
        try:
            return cls(
                **data
                | {
                    "warnings": tuple(data["warnings"]),
                    "passes": tuple(_pass(entry) for entry in data["passes"]),
                    "layers": tuple(_layer(entry) for entry in data["layers"]),
                    "outputs": _figures(data["outputs"]),
                    "parity": _figures(data["parity"]),
                    "cast": _figures(data.get("cast", {})),
                    "sizes": Sizes(**data["sizes"]),
                    "gates": tuple(GateResult(**entry) for entry in data["gates"]),
                    "sample_sums": _all_sums(data.get("sample_sums", {})),
                    "sensitivity": tuple(LayerSensitivity(**entry) for entry in data.get("sensitivity", [])),
                    "budget": _budget(data.get("budget")),
                    "histograms": _histograms(data.get("histograms", {})),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged qexport report: {error}") from error


def _pass(entry: dict[str, Any]) -> PassRecordView:
    skipped = tuple(SkipView(**skip) for skip in entry["skipped"])
    return PassRecordView(**entry | {"changed": tuple(entry["changed"]), "skipped": skipped})


def _layer(entry: dict[str, Any]) -> LayerDiff:
    evidence, stage = entry.get("evidence"), entry.get("stage")
    nested = {
        "output_sqnr_db": LayerSqnr(**entry["output_sqnr_db"]),
        "evidence": None if evidence is None else Evidence(**evidence),
        "causes": tuple(Cause(**cause) for cause in entry.get("causes", ())),
        "stage": None if stage is None else Stage(**stage | {"after": tuple(stage["after"])}),
    }
    return LayerDiff(**entry | nested)


def _histograms(layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Histogram]]:
    return {layer: {kind: _histogram(entry) for kind, entry in kinds.items()} for layer, kinds in layers.items()}


def _histogram(entry: dict[str, Any]) -> Histogram:
    return Histogram(**entry | {"before": tuple(entry["before"]), "after": tuple(entry["after"])})


def _figures(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, OutputDiff]]:
    return {run: {name: OutputDiff(**entry) for name, entry in outputs.items()} for run, outputs in runs.items()}


def _budget(entry: dict[str, Any] | None) -> Budget | None:
    return None if entry is None else Budget(**entry | {"layers": tuple(BudgetLayer(**row) for row in entry["layers"])})


def _all_sums(entry: dict[str, Any]) -> AllSums:
    return AllSums(
        outputs={run: _sums(outputs) for run, outputs in entry.get("outputs", {}).items()},
        layers=_sums(entry.get("layers", {})),
    )


def _sums(entries: dict[str, Any]) -> dict[str, Sums]:
    def numbers(entry: dict[str, Any], key: str) -> tuple[float, ...]:
        return tuple(map(float, entry[key]))

    return {
        name: Sums(
            numbers(entry, "signal"),
            numbers(entry, "noise"),
            None if entry["agreement"] is None else numbers(entry, "agreement"),
        )
        for name, entry in entries.items()
    }


def _fields(value: object) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]  # callers pass dataclasses


def _plain(value: object, where: str) -> object:
    if dataclasses.is_dataclass(value):
        value = _fields(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"report holds {value} at {where}")
        return float(f"{value:.{SIGNIFICANT}g}")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}".lstrip(".")) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    return value

"""The report of one compilation: plain frozen data and its JSON, schema version 1.

    schema_version  1
    model, recipe, environment, calibration   {key: value} as the stages give them
    warnings   [text]
    passes     [{name, options, inserted, changed: [name], skipped: [{node, why}], measured: {figure: value}}]
    layers     [{name, kind, format, bits_per_weight, params, weight_sqnr_db,
                 output_sqnr_db: {own, accumulated, onnxruntime, onnxruntime_vs_eager_quantized},
                 cosine, max_abs, kernel}]
    outputs    {runtime: {output: figures}}          runtimes: eager_quantized, onnxruntime, tensorrt
    parity     {run: {output: figures}}              runs: onnxruntime, onnxruntime_unoptimized, tensorrt
    metrics    {name: {reference, eager_quantized, onnxruntime, tensorrt}}
    sizes      {float_parameters, files: {name: bytes}}
    gates      [{expr, value, passed, measured, where}]

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
from collections.abc import Mapping
from typing import Any

from exporter.metrics import Figures

SCHEMA_VERSION = 1
SIGNIFICANT = 7
"""Digits of a number in the JSON: as many as a float32 holds."""

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


@dataclasses.dataclass(frozen=True)
class LayerDiff:
    """A layer with a weight: how it is stored, how far it is from float, and the runtime's kernel where known.

    kind             linear, conv, conv_transpose, embedding
    format           of the stored weight: float32, int8_channel, int4_group, ...
    bits_per_weight  bytes really stored (codes, scales, zero points) * 8 / params
    params           entries of the weight
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes: of the float parameters, and of each file written."""

    float_parameters: int
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)


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
    metrics: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    sizes: Sizes = Sizes(float_parameters=0)
    gates: tuple[GateResult, ...] = ()

    @property
    def gates_passed(self) -> bool:
        """True when no gate failed and every gate's figure was measured."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        """JSON text, keys sorted: equal reports give equal bytes. Raises ValueError for a NaN or an infinity."""
        data = {"schema_version": SCHEMA_VERSION, **_fields(self)}
        return json.dumps(_plain(data, ""), sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

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
                    "sizes": Sizes(**data["sizes"]),
                    "gates": tuple(GateResult(**entry) for entry in data["gates"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged qexport report: {error}") from error


def _pass(entry: dict[str, Any]) -> PassRecordView:
    skipped = tuple(SkipView(**skip) for skip in entry["skipped"])
    return PassRecordView(**entry | {"changed": tuple(entry["changed"]), "skipped": skipped})


def _layer(entry: dict[str, Any]) -> LayerDiff:
    return LayerDiff(**entry | {"output_sqnr_db": LayerSqnr(**entry["output_sqnr_db"])})


def _figures(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, OutputDiff]]:
    return {run: {name: OutputDiff(**entry) for name, entry in outputs.items()} for run, outputs in runs.items()}


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

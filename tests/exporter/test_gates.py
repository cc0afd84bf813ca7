"""Gates: what parses, what is refused and with which hint, whose figure counts, and the exit codes."""

import dataclasses

import pytest

from exporter.errors import InputError
from exporter.gates import Gate, GateSyntaxError, evaluate, exit_code, judge_layers, parse_gate
from exporter.metrics import Figures
from exporter.report import GateResult, LayerDiff, LayerSqnr, Report, Sizes


def figures(sqnr_db: float, max_abs: float = 0.05, top1: float | None = 1.0) -> Figures:
    return Figures(sqnr_db, 0.999, max_abs, max_abs / 4, top1, 0.001)


REPORT = Report(
    model={},
    recipe={},
    environment={},
    calibration={},
    outputs={
        "eager_quantized": {"logits": figures(35, 0.02), "features": figures(25, 0.5, None)},
        "onnxruntime": {"logits": figures(34, 0.03), "features": figures(24, 0.6, None)},
    },
    metrics={
        "accuracy": {"reference": 0.98, "eager_quantized": 0.97, "onnxruntime": 0.975},
        "perplexity": {"reference": 10.0, "eager_quantized": 10.25, "onnxruntime": 10.5, "tensorrt": None},
        "zero": {"reference": 0.0, "eager_quantized": 1.0},
        "vqa.v2": {"reference": 0.5, "eager_quantized": 0.25},
        "unreferenced": {"eager_quantized": 1.0},
    },
    layers=(
        LayerDiff("fc1", "linear", "int8", 8.5, 64, 31.0, LayerSqnr(40.0, 35.0, 36.0), 0.999, 0.1),
        LayerDiff("fc2", "linear", "int8", 8.5, 64, 33.0, LayerSqnr(40.0, 30.0, 12.0), 0.98, 0.2),
        LayerDiff("head", "linear", "float32", 32.0, 64, None, LayerSqnr(300.0, 28.0, 28.0), 0.999, 0.3),
    ),
    sizes=Sizes(1000, {"model.onnx": 100, "model.onnx.data": 150, "model.engine": 300, "model.safetensors": 900}),
)


def verdict(expr: str, report: Report = REPORT) -> GateResult:
    (result,) = evaluate([parse_gate(expr)], report)
    return result


@pytest.mark.parametrize(
    ("expr", "gate"),
    [
        ("sqnr_db>=20", Gate("sqnr_db>=20", "sqnr_db", ">=", 20.0)),
        (" top1_agreement > 0.99 ", Gate("top1_agreement>0.99", "top1_agreement", ">", 0.99)),
        ("size_ratio<=0.3", Gate("size_ratio<=0.3", "size_ratio", "<=", 0.3)),
        ("onnxruntime.max_abs<1e-1", Gate("onnxruntime.max_abs<1e-1", "max_abs", "<", 0.1, "onnxruntime")),
        ("metric.acc>=0.9", Gate("metric.acc>=0.9", "metric", ">=", 0.9, None, "acc")),
        ("metric.acc.drop<=-0.1", Gate("metric.acc.drop<=-0.1", "metric", "<=", -0.1, None, "acc", "drop")),
        ("metric.vqa.v2.ratio<=1", Gate("metric.vqa.v2.ratio<=1", "metric", "<=", 1.0, None, "vqa.v2", "ratio")),
        (
            "tensorrt.metric.acc.rise<=1",
            Gate("tensorrt.metric.acc.rise<=1", "metric", "<=", 1, "tensorrt", "acc", "rise"),
        ),
        ("layer.max_abs<1", Gate("layer.max_abs<1", "layer", "<", 1.0, layer="max_abs")),
        ("metric.drop==0", Gate("metric.drop==0", "metric", "==", 0.0, None, "drop")),
    ],
)
def test_parses(expr, gate):
    assert parse_gate(expr) == gate


@pytest.mark.parametrize(
    ("expr", "hint"),
    [
        ("sqnr>=20", "did you mean sqnr_db"),
        ("onnxruntim.max_abs<=1", "did you mean onnxruntime.max_abs"),
        ("metrics.accuracy.drop<=1", "did you mean metric.NAME"),
        ("metric.>=1", "did you mean metric.NAME"),
        ("quux<=1", "known are sqnr_db, cosine"),
        ("sqnr_db", "for example sqnr_db>=20"),
        ("", "for example sqnr_db>=20"),
        ("sqnr_db=20", "for example sqnr_db>=20"),
        ("sqnr_db>=20<=30", "for example sqnr_db>=20"),
        ("sqnr_db>=high", "not a finite number"),
        ("sqnr_db>=nan", "not a finite number"),
        ("sqnr_db>=inf", "not a finite number"),
        ("onnxruntime.>=1", "unknown figure"),
        ("layer.sqnr_db>=15", "or layer.output_sqnr_db"),
        ("onnxruntime.layer.max_abs<=1", "unknown figure"),
    ],
)
def test_refuses_with_a_hint_on_one_line(expr, hint):
    with pytest.raises(GateSyntaxError) as caught:
        parse_gate(expr)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)  # exit code 2


@pytest.mark.parametrize(
    ("expr", "value", "passed", "where"),
    [
        ("sqnr_db>=20", 24, True, "onnxruntime features"),
        ("sqnr_db>=30", 24, False, "onnxruntime features"),
        ("sqnr_db<=30", 35, False, "eager_quantized logits"),
        ("sqnr_db==24", 35, False, "eager_quantized logits"),
        ("eager_quantized.sqnr_db>=25", 25, True, "eager_quantized features"),
        ("eager_quantized.sqnr_db>25", 25, False, "eager_quantized features"),
        ("max_abs<=0.1", 0.6, False, "onnxruntime features"),
        ("max_abs<0.6", 0.6, False, "onnxruntime features"),
        ("top1_agreement>=0.99", 1.0, True, "eager_quantized logits"),
        ("size_ratio<=0.3", 0.3, True, "tensorrt"),
        ("onnxruntime.size_ratio<=0.3", 0.25, True, "onnxruntime"),
        ("eager_quantized.size_ratio<=0.3", 0.9, False, "eager_quantized"),
        ("metric.accuracy>=0.975", 0.97, False, "eager_quantized"),
        ("metric.accuracy.drop<=0.02", 0.98 - 0.97, True, "eager_quantized"),
        ("onnxruntime.metric.accuracy.drop<=0.02", 0.98 - 0.975, True, "onnxruntime"),
        ("metric.perplexity.rise<=0.5", 0.5, True, "onnxruntime"),
        ("metric.perplexity.ratio<=1.03", 1.05, False, "onnxruntime"),
        ("metric.vqa.v2.ratio>=0.5", 0.5, True, "eager_quantized"),
        ("layer.output_sqnr_db>=15", 12.0, False, "fc2"),  # the file is worse than eager torch
        ("layer.output_sqnr_db>=10", 12.0, True, "fc2"),
        ("layer.weight_sqnr_db>=30", 31.0, True, "fc1"),  # the head is float and has none
        ("layer.cosine>=0.99", 0.98, False, "fc2"),
        ("layer.bits_per_weight<=9", 32.0, False, "head"),
    ],
)
def test_the_figure_furthest_from_passing_decides(expr, value, passed, where):
    result = verdict(expr)
    assert result.value == pytest.approx(value, rel=1e-12)
    assert (result.passed, result.measured, result.where) == (passed, True, where)


@pytest.mark.parametrize(
    "expr",
    [
        "tensorrt.sqnr_db>=1",
        "metric.missing>=0",
        "tensorrt.metric.perplexity.ratio<=1",
        "metric.zero.ratio<=1",
        "metric.unreferenced.drop<=1",
    ],
)
def test_what_was_not_measured_has_not_passed(expr):
    result = verdict(expr)
    assert (result.value, result.passed, result.measured) == (None, False, False)


def test_each_layer_has_a_verdict():
    found = judge_layers(parse_gate("layer.weight_sqnr_db>=32"), REPORT)
    assert {name: (result.value, result.passed) for name, result in found.items()} == {
        "fc1": (31.0, False),
        "fc2": (33.0, True),
    }
    assert judge_layers(parse_gate("sqnr_db>=32"), REPORT) == {}


def test_a_gate_on_layers_needs_one():
    assert not verdict("layer.output_sqnr_db>=1", dataclasses.replace(REPORT, layers=())).measured


def test_size_ratio_needs_an_artifact():
    only_checkpoint = dataclasses.replace(REPORT, sizes=Sizes(1000, {"model.safetensors": 10}))
    assert not verdict("size_ratio<=0.3", only_checkpoint).measured


def test_exit_codes():
    passed, failed = verdict("sqnr_db>=20"), verdict("sqnr_db>=90")
    unmeasured = verdict("tensorrt.sqnr_db>=1")
    assert exit_code([]) == 0
    assert exit_code([passed]) == 0
    assert exit_code([passed, failed]) == 3
    assert exit_code([passed, unmeasured]) == 4
    assert exit_code([unmeasured, failed]) == 3

"""The JSON of a report: the schema that tools may rely on, stable bytes, round trip, refusal of what is not one."""

import dataclasses
import json
from pathlib import Path

import pytest

from exporter.metrics import Figures
from exporter.report import (
    AllSums,
    Cause,
    Evidence,
    GateResult,
    Histogram,
    LayerDiff,
    LayerSqnr,
    PassRecordView,
    Report,
    Sizes,
    SkipView,
    Stage,
    Sums,
)

GOLDEN = Path(__file__).parent / "golden" / "report.json"

FIGURES = Figures(34.25, 0.9998, 0.0639, 0.0154, 0.995, 0.000161)

REPORT = Report(
    model={"name": "mobilenet.pt2", "kind": "torch.export"},
    recipe={"passes": ["cle", "gptaq:bits=8"], "target": ["onnx"], "seed": 0},
    environment={"torch": "2.13.0"},
    calibration={"source": "digits.safetensors", "samples": 128},
    warnings=("calibration data is synthetic",),
    passes=(
        PassRecordView("fold-bn", {}, inserted=True, changed=("features.0",)),
        PassRecordView("cle", {"sweeps": 20}, skipped=(SkipView("features.3", "branches"),), measured={"sweeps": 4.0}),
    ),
    layers=(
        LayerDiff(
            "features.0",
            "conv",
            "int8_channel",
            8.25,
            432,
            41.5,
            LayerSqnr(38.0, 36.5),
            0.9999,
            0.02,
            "QLinearConv",
            Evidence(weight_bits=8.0, input_bits=8, weight_outlier_ratio=9.5, weight_outlier_axis="input"),
            (Cause("outlier channels", "input channel 3 of the weight"),),
            stage=Stage("quantization", True, ("stem",), {"quantization": 38.0}, {"quantization": 36.5}),
        ),
        LayerDiff("head", "linear", "float32", 32.0, 640),
    ),
    outputs={"eager_quantized": {"logits": FIGURES}},
    parity={"onnxruntime": {"logits": dataclasses.replace(FIGURES, sqnr_db=99.7, top1_agreement=None, kl=None)}},
    metrics={"accuracy": {"reference": 0.987, "eager_quantized": 0.984, "onnxruntime": None}},
    sizes=Sizes(4_000_000, {"model.onnx": 1_040_000}),
    gates=(GateResult("sqnr_db>=20", 34.25, True, where="eager_quantized logits"),),
    histograms={"features.0": {"weight": Histogram(-1.0, 1.5, (1, 2, 3), (2, 2, 2))}},
    sample_sums=AllSums(
        {"eager_quantized": {"logits": Sums((2.5, 1.0), (0.001, 0.0004), (1.0, 0.5))}},
        {"features.0": Sums((4.0, 3.0), (2e-4, 1e-4))},
    ),
)


def test_json_is_the_golden_file():
    assert REPORT.to_json() == GOLDEN.read_text(encoding="utf-8")


def test_round_trip():
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_lists_of_numbers_stand_on_one_line():
    assert '"signal": [2.5, 1.0]' in REPORT.to_json()


def test_a_report_of_before_the_sums_is_read():
    data = json.loads(REPORT.to_json())
    del data["sample_sums"]
    assert Report.from_json(json.dumps(data)).sample_sums == AllSums()


def test_a_report_without_evidence_is_read():
    """One that an earlier version wrote."""
    data = json.loads(REPORT.to_json())
    del data["histograms"]
    for entry in data["layers"]:
        del entry["evidence"], entry["causes"], entry["stage"]
    read = Report.from_json(json.dumps(data))
    assert read.histograms == {}
    assert read.layers[0].causes == ()


def test_a_layer_is_judged_by_the_worse_of_network_and_file():
    assert LayerSqnr(own=5.0, accumulated=30.0, onnxruntime=12.0).worst == 12.0
    assert LayerSqnr(accumulated=30.0).worst == 30.0
    assert LayerSqnr(own=5.0).worst is None


def test_numbers_are_rounded_once_and_for_all():
    report = dataclasses.replace(REPORT, metrics={"perplexity": {"reference": 12.3456789012}})
    text = report.to_json()
    assert json.loads(text)["metrics"]["perplexity"]["reference"] == 12.34568
    assert Report.from_json(text).to_json() == text


def test_order_of_keys_does_not_show():
    turned = dataclasses.replace(REPORT, recipe=dict(reversed(REPORT.recipe.items())))
    assert turned.to_json() == REPORT.to_json()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_lacks_is_refused_and_named(value):
    report = dataclasses.replace(REPORT, metrics={"accuracy": {"onnxruntime": value}})
    with pytest.raises(ValueError, match=r"at metrics\.accuracy\.onnxruntime"):
        report.to_json()


def test_gates_passed_needs_every_gate():
    failed = GateResult("max_abs<=0.1", 0.2, False)
    unmeasured = GateResult("tensorrt.max_abs<=0.1", None, False, measured=False)
    assert REPORT.gates_passed
    assert dataclasses.replace(REPORT, gates=()).gates_passed
    assert not dataclasses.replace(REPORT, gates=(*REPORT.gates, failed)).gates_passed
    assert not dataclasses.replace(REPORT, gates=(*REPORT.gates, unmeasured)).gates_passed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a qexport report"),
        ("[1, 2]", "not a qexport report"),
        ("{}", "not a qexport report"),
        ('{"schema_version": 2}', "schema version 2, this qexport reads 1"),
        ('{"schema_version": 1, "layers": []}', "damaged qexport report"),
    ],
)
def test_what_is_no_report_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Report.from_json(text)


def test_a_damaged_entry_is_refused():
    data = json.loads(REPORT.to_json())
    del data["layers"][0]["format"]
    with pytest.raises(ValueError, match=r"damaged qexport report.*format"):
        Report.from_json(json.dumps(data))

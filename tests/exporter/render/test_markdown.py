"""The markdown of a report: what it must say, that it is well formed, and that a comment can hold it."""

import dataclasses
import re

import pytest

from exporter.metrics import Figures
from exporter.render.markdown import render
from exporter.report import GateResult, LayerDiff, LayerSqnr, PassRecordView, Report, Sizes, SkipView

FIGURES = Figures(34.26, 0.99981, 0.0639, 0.0154, 0.995, 0.000161)

REPORT = Report(
    model={"name": "mobilenet.pt2"},
    recipe={"passes": "cle,gptq:bits=4", "target": ["onnx", "trt"], "seed": 0, "eval": None, "skip": [], "layers": []},
    environment={"torch": "2.13.0"},
    calibration={"source": "digits.npz", "samples": 128},
    warnings=("calibration data is synthetic",),
    passes=(
        PassRecordView("fold-bn", {}, inserted=True, changed=("a", "b")),
        PassRecordView(
            "cle", {"act_order": True}, False, (), (SkipView("conv3", "branches | twice"),), {"sweeps": 4.0}
        ),
    ),
    layers=(
        LayerDiff("bad", "conv", "int8_channel", 8.5, 1000, 40.0, LayerSqnr(30.0, 20.0), 0.99, 0.1, "QLinearConv"),
        LayerDiff("good", "linear", "int4_group", 4.25, 1000, 40.0, LayerSqnr(30.0, 25.0), 0.99, 0.1, "MatMulNBits"),
    ),
    outputs={"eager_quantized": {"logits": FIGURES}, "onnxruntime": {"logits": FIGURES, "pooled": FIGURES}},
    parity={"onnxruntime_unoptimized": {"logits": dataclasses.replace(FIGURES, sqnr_db=300.0)}},
    metrics={"accuracy": {"reference": 0.987, "onnxruntime": 0.985}},
    sizes=Sizes(4_000_000, {"model.onnx": 1_040_000}),
    gates=(GateResult("sqnr_db>=40", 34.26, False, where="onnxruntime logits"),),
)


@pytest.mark.parametrize(
    "line",
    [
        "## qexport mobilenet.pt2: 1 of 1 gate failed",
        "2 k weights at 6.38 bits, float 4 MB",
        "> **Warning:** calibration data is synthetic",
        "| `sqnr_db>=40` | 34.26 | **FAILED** | onnxruntime logits |",
        "| quantized eager | 34.3 | 0.99981 | 0.0639 | 0.0154 | 99.50 % | 0.000161 |",
        "| onnxruntime: pooled | 34.3 | 0.99981 | 0.0639 | 0.0154 | 99.50 % | 0.000161 |",
        "| onnxruntime, unoptimized | exact | 0.99981 | 0.0639 | 0.0154 | 99.50 % | 0.000161 |",
        "| metric | float | onnxruntime |",
        "| accuracy | 0.987 | 0.985 |",
        "| `model.onnx` | 1.04 MB | 26.00 % |",
        "| `bad` | int8_channel | 8.50 | 40.0 | 30.0 | 20.0 | QLinearConv |",
        "Kernels: MatMulNBits 1, QLinearConv 1",
        "| `fold-bn` (inserted) |  | 2 | 0 |  |",
        "| `cle` | act_order=true | 0 | 1 | sweeps 4 |",
        r"- `cle` left `conv3`: branches \| twice",
        "qexport mobilenet.pt2 --passes cle,gptq:bits=4 --target onnx --target trt --seed 0",
        "Calibration: source digits.npz, samples 128",
        "Made with torch 2.13.0",
    ],
)
def test_says(line):
    assert line in render(REPORT).splitlines()


def test_worst_layer_first():
    text = render(REPORT)
    assert text.index("| `bad` |") < text.index("| `good` |")


def test_rows_of_a_table_have_as_many_cells():
    tables = re.findall(r"(?:^\|.*\|\n)+", render(REPORT), re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_a_report_of_nothing_is_short():
    text = render(Report({}, {}, {}, {}))
    assert text.splitlines()[0] == "## qexport model: done, no gates set"
    assert "|" not in text


def test_rules_per_layer_are_pointed_to():
    rules = dataclasses.replace(REPORT, recipe={"layers": [{"match": "*.fc2", "bits": 8}]})
    assert "with the rules per layer of `recipe.layers` in report.json" in render(rules)
    assert "recipe.layers" not in render(REPORT)


def test_a_big_report_fits_a_comment():
    layers = tuple(dataclasses.replace(REPORT.layers[0], name=f"model.decoder.layers.{i}.fc1") for i in range(1000))
    skipped = tuple(SkipView(f"node_{i}", "its output branches into several nodes") for i in range(1000))
    passes = tuple(PassRecordView(f"pass-{i}", {}, skipped=skipped) for i in range(20))
    outputs = {"onnxruntime": {f"present.{i}.key": FIGURES for i in range(200)}}
    text = render(dataclasses.replace(REPORT, layers=layers, passes=passes, outputs=outputs, parity=outputs))
    assert len(text) < 65536
    assert "- and 19960 more in report.json" in text
    assert "160 more in report.json" in text

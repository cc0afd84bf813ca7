"""The markdown of a report: what it must say, that it is well formed, and that a comment can hold it."""

import dataclasses
import re

import pytest

from exporter.metrics import Figures
from exporter.render.markdown import render
from exporter.report import Cause, GateResult, LayerDiff, LayerSqnr, PassRecordView, Report, Sizes, SkipView, Stage

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
        LayerDiff(
            "bad",
            "conv",
            "int8_channel",
            8.5,
            1000,
            40.0,
            LayerSqnr(30.0, 20.0),
            0.99,
            0.1,
            "QLinearConv",
            causes=(Cause("clipping", "much"), Cause("rounding", "weight"), Cause("rounding", "input")),
            stage=Stage("lowering", True, own={"quantization": 30.0, "lowering": 140.0}, total={"lowering": 20.0}),
        ),
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
        "- **0.987 → 0.985** accuracy, float → quantized (SQNR 34.3 dB, top-1 agreement 99.50 %)",
        "- **26.0 %** of the float size (1.04 MB instead of 4 MB)",
        "| `bad` | int8_channel | 8.50 | 40.0 | 30.0 | 20.0 | QLinearConv | lowering, inherited | clipping, rounding |",
        "| `good` | int4_group | 4.25 | 40.0 | 30.0 | 25.0 | MatMulNBits | - | - |",
        "Where the accuracy went: most noise of one layer: quantization at bad, 30.0 dB; layers by stage: lowering 1",
        "<details><summary>2 passes, 1 node skipped</summary>",
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


def big(outputs: int) -> Report:
    """500 layers with names of 100 characters, and passes that skip many of them."""
    names = [f"model.decoder.layers.{i:03}.self_attention.{'block.' * 9}projection" for i in range(500)]
    layers = tuple(dataclasses.replace(REPORT.layers[0], name=name) for name in names)
    skipped = tuple(SkipView(name, "its output branches into several nodes") for name in names)
    passes = tuple(PassRecordView(name, {"bits": 8}, changed=tuple(names), skipped=skipped) for name in ("cle", "gptq"))
    figures = {"onnxruntime": {f"present.{i}.key": FIGURES for i in range(outputs)}}
    return dataclasses.replace(REPORT, layers=layers, passes=passes, outputs=figures, parity=figures)


def test_a_big_report_is_a_short_comment():
    text = render(big(outputs=1))
    assert len(text.encode()) < 10_000
    assert "**Worst layers** (10 of 500)" in text
    assert "- and 980 more in report.json" in text


def test_whatever_there_is_much_of_fits_a_comment():
    passes = tuple(PassRecordView(f"pass-{i}", {"option": "x" * 100}) for i in range(100))
    gates = tuple(GateResult(f"metric.m{i}>=1", 1.0, True, where="y" * 100) for i in range(100))
    text = render(dataclasses.replace(big(outputs=200), passes=passes, gates=gates))
    assert len(text.encode()) < 65536
    assert "180 more in report.json" in text


def test_names_are_no_markup():
    name = "a`b|<img src=x>"
    layer = dataclasses.replace(REPORT.layers[0], name=name, kernel="<b>")
    text = render(dataclasses.replace(REPORT, layers=(layer,), warnings=("<script>",), model={"name": "<i>"}))
    assert r"| `a'b\|<img src=x>` |" in text  # in backticks it is no element
    assert "&lt;b>" in text
    assert "&lt;script>" in text
    assert text.startswith("## qexport &lt;i>")

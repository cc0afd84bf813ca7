"""The terminal summary: it fits 80 columns, loses nothing without colour, and takes names as they are."""

import dataclasses
import io

from rich.console import Console

from exporter.metrics import Figures
from exporter.render.terminal import render
from exporter.report import GateResult, LayerDiff, LayerSqnr, Report, Sizes, Stage

FIGURES = Figures(34.26, 0.99981, 0.0639, 0.0154, 0.995, 0.000161)

LONG = "model.decoder.layers.23.self_attention.heads.of.a.name.that.is.a.hundred.long.query_key_value_projection[red]"

STAGE = Stage("lowering", own={"lowering": 12.5}, total={"lowering": 12.5})

REPORT = Report(
    model={"name": "opt.pt2"},
    recipe={},
    environment={},
    calibration={},
    warnings=("calibration data is synthetic: figures say little about real input, give --calib to be sure of them",),
    layers=(
        LayerDiff(
            LONG, "linear", "int4_group", 4.25, 1000, -12.5, LayerSqnr(-10.5, -10.25), 0.9, 1.0, "A" * 40, stage=STAGE
        ),
        LayerDiff("head[0]", "linear", "float32", 32.0, 1000, 300.0, LayerSqnr(300.0, 300.0)),
    ),
    outputs={run: {LONG: FIGURES, "b": FIGURES} for run in ("eager_quantized", "onnxruntime", "tensorrt")},
    parity={"onnxruntime_unoptimized": {"logits": FIGURES}},
    metrics={"a metric with a long name of its own": dict.fromkeys(("reference", "onnxruntime"), 1234567.0)},
    sizes=Sizes(10**9, {"model.onnx.data": 10**8}),
    gates=(
        GateResult(f"metric.{LONG}.drop<=0.001", 0.1, False, where=f"onnxruntime {LONG}"),
        GateResult("sqnr_db>=20", 34.26, True, where="onnxruntime logits"),
        GateResult("tensorrt.kl<=1", None, False, measured=False, where="tensorrt"),
        GateResult("layer.output_sqnr_db>=15", -10.25, False, where=LONG),
    ),
)


def shown(report: Report, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width).print(render(report))
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_every_line_fits_80_columns():
    assert len(LONG) >= 100
    assert max(len(line.rstrip()) for line in shown(REPORT)) <= 80


def test_figures_are_whole():
    """Names give way, figures do not: rich marks what it cuts with an ellipsis."""
    text = "\n".join(shown(REPORT))
    assert "…" not in text
    for figure in (
        "34.3",
        "0.99981",
        "99.50 %",
        "-12.5",
        "-10.2",
        "exact",
        "1.23457e+06",
        "100 MB",
        "10.00 %",
        "FAILED",
    ):
        assert figure in text


def test_names_in_brackets_are_no_markup():
    assert any("head[0]" in line for line in shown(REPORT))
    assert any("projection[red]"[-10:] in line for line in shown(REPORT))


def test_title_warnings_and_gates():
    lines = [line.rstrip() for line in shown(REPORT)]
    assert lines[0] == "opt.pt2: 2 of 4 gates failed"
    assert lines[2].startswith("warning: calibration data is synthetic")
    passed = next(line for line in lines if line.startswith("sqnr_db>=20"))
    assert passed.split() == ["sqnr_db>=20", "34.26", "passed", "onnxruntime", "logits"]
    assert any(line.startswith("tensorrt.kl<=1") and "not measured" in line for line in lines)


def test_an_ascii_terminal_can_show_it():
    assert shown(REPORT, encoding="ascii")[0].rstrip() == "opt.pt2: 2 of 4 gates failed"


def test_empty_tables_are_left_out():
    lines = [line.rstrip() for line in shown(Report({}, {}, {}, {}))]
    assert [line for line in lines if line] == ["model: done, no gates set"]


def test_verdict_without_failures():
    passed = dataclasses.replace(REPORT, gates=REPORT.gates[1:2])
    assert shown(passed)[0].rstrip() == "opt.pt2: passed its gate"


def test_the_first_fault_is_named():
    text = " ".join(line.strip() for line in shown(REPORT))
    assert "first fault: lowering at model.decoder" in text
    assert "12.5 dB; layers by stage: lowering 1" in text

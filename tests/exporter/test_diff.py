"""What `qexport diff` finds between two reports, what it holds for chance, and its gates."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from exporter.diff import Change, ReportDiff, diff_reports, read_report
from exporter.diff_gates import evaluate_diff, parse_diff_gate
from exporter.errors import InputError
from exporter.gates import GateSyntaxError, exit_code
from exporter.metrics import Figures, decibels
from exporter.render.diff_text import markdown
from exporter.report import AllSums, GateResult, LayerDiff, LayerSqnr, Report, Sizes, Sums

GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.lognormal(0, 0.5, 40)


def sums(factor: float, noise: np.ndarray = NOISE) -> Sums:
    return Sums((1000.0,) * len(noise), tuple(map(float, factor * noise)), (1.0,) * len(noise))


def sqnr(found: Sums) -> float:
    return decibels(sum(found.signal), sum(found.noise))


def report(output: Sums, layers: dict[str, Sums], bits: float = 8.0, accuracy: float = 0.9, size: int = 250) -> Report:
    return Report(
        model={},
        recipe={},
        environment={},
        calibration={"sha256": "1", "held_out": 40},
        layers=tuple(
            LayerDiff(name, "linear", "int8_channel", bits, 100, 40.0, LayerSqnr(accumulated=sqnr(found)))
            for name, found in layers.items()
        ),
        outputs={"onnxruntime": {"logits": Figures(sqnr(output), 0.99, 0.1, 0.01, 1.0, 0.001)}},
        metrics={"accuracy": {"reference": 0.95, "onnxruntime": accuracy}},
        sizes=Sizes(1000, {"model.onnx": size}),
        sample_sums=AllSums({"onnxruntime": {"logits": output}}, layers),
    )


OLD = report(sums(1.0), {"first": sums(1.0), "second": sums(1.0), "gone": sums(1.0)})
WORSE = report(
    sums(2.0), {"first": sums(4.0), "second": sums(1.0), "new": sums(1.0)}, bits=4.0, accuracy=0.88, size=300
)
SHAKEN = report(sums(1.0, GENERATOR.permutation(NOISE) * 1.02), {"first": sums(1.0)})


def verdicts(diff: ReportDiff) -> dict[str, str]:
    return {change.figure: change.verdict for change in diff.outputs}


def judged(expr: str, new: Report = WORSE, old: Report = OLD) -> GateResult:
    (result,) = evaluate_diff([parse_diff_gate(expr)], old, new, diff_reports(old, new))
    return result


def test_a_regression_is_told_from_chance() -> None:
    assert verdicts(diff_reports(OLD, WORSE))["sqnr_db"] == "worse"
    assert verdicts(diff_reports(WORSE, OLD))["sqnr_db"] == "better"
    assert verdicts(diff_reports(OLD, SHAKEN))["sqnr_db"] == "noise"
    assert set(verdicts(diff_reports(OLD, OLD)).values()) == {"same"}


def test_the_interval_holds_the_change() -> None:
    change = diff_reports(OLD, WORSE).outputs[0]
    assert change.interval is not None
    assert change.interval.low <= change.new - change.old <= change.interval.high
    assert change.new - change.old == pytest.approx(-3.01, abs=0.01)  # twice the noise


def test_layers_are_matched_by_name() -> None:
    diff = diff_reports(OLD, WORSE)
    assert [layer.name for layer in diff.layers] == ["first", "second"]
    assert (diff.only_old, diff.only_new) == (("gone",), ("new",))
    assert [change.where for change in diff.layer_regressions] == ["first"]
    assert all(layer.stored_differently for layer in diff.layers)
    assert not any(layer.stored_differently for layer in diff_reports(OLD, OLD).layers)


def test_a_report_without_sums_is_compared_as_it_stands() -> None:
    plain = dataclasses.replace(OLD, sample_sums=AllSums())
    diff = diff_reports(plain, WORSE)
    assert verdicts(diff)["sqnr_db"] == "changed"
    assert any("OLD holds no figures by sample" in remark for remark in diff.remarks)
    assert not judged("regressions==0", old=plain).measured
    assert not judged("sqnr_db.drop<=1", old=plain).passed


def test_other_samples_and_another_model_are_said() -> None:
    other = dataclasses.replace(WORSE, calibration={"sha256": "2", "held_out": 40})
    assert any("not validated on the same samples" in remark for remark in diff_reports(OLD, other).remarks)
    loud = dataclasses.replace(sums(1.0), signal=(2000.0,) * 40)
    retrained = dataclasses.replace(OLD, sample_sums=AllSums({"onnxruntime": {"logits": loud}}))
    assert any("float models differ" in remark for remark in diff_reports(OLD, retrained).remarks)
    assert diff_reports(OLD, WORSE).remarks == ()


def test_what_only_one_side_measured_is_said() -> None:
    more = dataclasses.replace(OLD, outputs={**OLD.outputs, "tensorrt": OLD.outputs["onnxruntime"]}, metrics={})
    assert diff_reports(OLD, more).remarks == ("tensorrt ran in NEW only", "metric accuracy is in OLD only")


@pytest.mark.parametrize(
    ("expr", "value", "passed", "where"),
    [
        ("sqnr_db.drop<=3.1", 3.01, True, "onnxruntime logits"),
        ("sqnr_db.drop<=0.5", 3.01, False, "onnxruntime logits"),
        ("onnxruntime.sqnr_db.rise>=-1", -3.01, False, "onnxruntime logits"),
        ("metric.accuracy.drop<=0.01", 0.02, False, "onnxruntime"),
        ("onnxruntime.metric.accuracy.ratio>=0.9", 0.88 / 0.9, True, "onnxruntime"),
        ("size_ratio.rise<=0.05", 0.05, True, "onnxruntime"),
        ("size_ratio.ratio<=1.1", 1.2, False, "onnxruntime"),
        ("layer.output_sqnr_db.drop<=3", 6.02, False, "first"),
        ("layer.bits_per_weight.rise<=0", -4.0, True, "first"),
        ("regressions==0", 1, False, "onnxruntime logits"),
        ("layer.regressions<=1", 1, True, "first"),
    ],
)
def test_gates(expr: str, value: float, passed: bool, where: str) -> None:
    result = judged(expr)
    # 0.01: the decibels above are written with two digits.
    assert result.value == pytest.approx(value, abs=0.01 if "db" in expr else 1e-9)
    assert (result.passed, result.measured, result.where) == (passed, True, where)


def test_what_one_side_lacks_is_not_measured() -> None:
    assert not judged("tensorrt.sqnr_db.drop<=1").measured
    assert not judged("metric.perplexity.rise<=1").measured
    assert exit_code([judged("tensorrt.sqnr_db.drop<=1")]) == 4
    assert exit_code([judged("sqnr_db.drop<=1")]) == 3


@pytest.mark.parametrize(
    ("expr", "hint"),
    [
        ("sqnr_db<=1", "sqnr_db.drop"),
        ("sqnr_bd.drop<=1", "sqnr_db.drop"),
        ("layer.sqnr.drop<=1", "did you mean layer"),
        ("regression==0", "regressions"),
        ("what==0", "write for example"),
        ("sqnr_db.drop", "is not a gate"),
        ("sqnr_db.drop<=many", "not a finite number"),
    ],
)
def test_what_is_no_gate_is_refused_with_the_nearest(expr: str, hint: str) -> None:
    with pytest.raises(GateSyntaxError, match=hint):
        parse_diff_gate(expr)


def test_json_holds_the_changes() -> None:
    data = json.loads(diff_reports(OLD, WORSE).to_json())
    (change,) = [entry for entry in data["outputs"] if entry["figure"] == "sqnr_db"]
    assert change["verdict"] == "worse"
    assert change["interval"]["high"] < 0
    assert data["layers"][0]["old"]["bits_per_weight"] == 8.0


def test_markdown_says_what_is_worse_first() -> None:
    diff = dataclasses.replace(diff_reports(OLD, WORSE), gates=(judged("sqnr_db.drop<=0.5"),))
    text = markdown(diff)
    assert text.startswith("## qexport diff OLD → NEW: 1 of 1 gate failed\n")
    assert "| onnxruntime | SQNR dB |" in text
    assert "**WORSE**" in text
    assert "**layers: 1 worse, 1 same**" in text
    assert "**layers in OLD only: gone**" in text


def test_a_comment_stays_short_however_many_layers() -> None:
    many = {f"block.{index}.a_layer_with_a_long_name": sums(1.0) for index in range(500)}
    old = report(sums(1.0), many)
    new = report(sums(2.0), {name: sums(1.0 + index / 100) for index, name in enumerate(many)}, bits=4.0)
    diff = diff_reports(old, new)
    assert len(diff.layer_regressions) == 499
    assert len(markdown(diff)) < 20_000  # a comment on GitHub holds 65536 characters


def test_reports_are_read_from_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(OLD.to_json())
    assert read_report(tmp_path) == read_report(tmp_path / "report.json")
    for missing, what in ((tmp_path / "none", "no such"), (tmp_path.parent / "x", "no such")):
        with pytest.raises(InputError, match=what):
            read_report(missing)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a report"):
        read_report(tmp_path)


def test_a_change_is_judged_by_its_direction() -> None:
    found = {(change.figure, change.verdict) for change in diff_reports(OLD, WORSE).metrics}
    assert found == {("accuracy", "same"), ("accuracy", "changed")}  # the reference, and onnxruntime
    assert isinstance(diff_reports(OLD, WORSE).outputs[0], Change)

"""Budgets: terms, the greedy path, and whole compilations under them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exporter.budget import greedy_path
from exporter.budget_options import Option
from exporter.budget_terms import parse_budget
from exporter.cli import run
from exporter.errors import InputError
from exporter.report import Report
from passes.base import LayerRule


def option(name: str, stored: float, noise: float) -> Option:
    return Option(name, stored, noise, LayerRule("x"))


def layer(*options: Option) -> dict[str, Option]:
    return {found.name: found for found in options}


def test_terms() -> None:
    size, metric = parse_budget("size <= 0.3, metric.accuracy.drop<=0.005")
    assert (size.figure, size.bound, size.expr) == ("size_ratio", 0.3, "size_ratio<=0.3")
    assert (metric.metric, metric.change) == ("accuracy", "drop")
    assert parse_budget("size_ratio<0.3")[0].figure == "size_ratio"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "--budget: '' is not a gate"),
        ("size<=0.3,", "--budget: '' is not a gate"),
        ("size>=0.3", "'size>=0.3' is no bound to stay within"),
        ("sqnr_db==30", "'sqnr_db==30' is no bound to stay within"),
        ("sqnr_bd>=30", "did you mean sqnr_db"),
        ("size<=small", "not a finite number"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        parse_budget(text)


def test_the_path_saves_where_it_costs_least() -> None:
    layers = {
        "tough": layer(option("float", 100, 0.0), option("8", 25, 0.001), option("4", 13, 0.002)),
        "touchy": layer(option("float", 100, 0.0), option("8", 25, 0.002), option("4", 13, 0.5)),
    }
    path = [tuple(point.values()) for point in greedy_path(layers)]
    # Noise per byte: tough to 8 bits 0.001 / 75, less than straight to 4 bits, 0.002 / 87; touchy to 8 bits 0.002 / 75,
    # less than tough from 8 to 4 bits, 0.001 / 12; touchy to 4 bits comes last.
    assert path == [("float", "float"), ("8", "float"), ("8", "8"), ("4", "8"), ("4", "4")]


def test_an_option_that_saves_nothing_is_never_taken() -> None:
    layers = {"a": layer(option("float", 100, 0.0), option("8", 25, 0.001), option("4", 25, 0.01))}
    assert [point["a"] for point in greedy_path(layers)] == ["float", "8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt2 with a narrow layer in front that everything depends on, and data.npz."""
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (torch.randn(4, 128),), dynamic_shapes=batch), folder / "model.pt2")
    values = np.random.default_rng(0).standard_normal((60, 128), dtype=np.float32)
    np.savez(folder / "data.npz", input=values)
    return folder


def compiled(files: Path, out: Path, *flags: str) -> int:
    given = ["--calib", str(files / "data.npz"), "--passes", "gptq", "--no-resume", "--quiet", "--out", str(out)]
    return run([str(files / "model.pt2"), *given, *flags])


def report_of(out: Path) -> Report:
    return Report.from_json((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sized(files: Path) -> Path:
    """An output of 22 % of the float size."""
    assert compiled(files, files / "out", "--budget", "size<=0.22") == 0
    return files / "out"


@pytest.mark.ort
def test_a_size_is_met_and_the_report_says_how(sized: Path) -> None:
    report = report_of(sized)
    assert report.budget is not None
    assert report.budget.met
    (gate,) = report.gates
    assert (gate.expr, gate.passed) == ("size_ratio<=0.22", True)
    chosen = {entry.name: entry.chosen for entry in report.budget.layers}
    assert "4" in chosen.values()  # 8 bits alone take more than a quarter
    assert set(chosen.values()) - {"4", "3"}  # and not everything had to go down
    for entry, stored in zip(report.budget.layers, report.layers, strict=True):
        assert stored.name == entry.name
        # Bytes are whole numbers: half a byte of at least 1 kB.
        assert stored.bits_per_weight == pytest.approx(8 * entry.bytes[entry.chosen] / stored.params, rel=1e-3)
    first = report.budget.layers[0]
    assert first.bytes["float"] == 128 * 256 * 4
    assert first.alone_sqnr_db["8"] > first.alone_sqnr_db["4"] > first.alone_sqnr_db["3"]


@pytest.mark.ort
def test_layers_with_adapters_are_chosen_for_with_them(files: Path, tmp_path: Path) -> None:
    flags = ["--passes", "gptq:bits=3:group_size=32,qdora:rank=4:steps=0"]
    assert compiled(files, tmp_path / "out", *flags, "--budget", "size<=0.22") == 0
    report = report_of(tmp_path / "out")
    assert report.budget is not None
    assert [entry.name for entry in report.budget.layers] == ["0", "2", "4"]
    assert {name for entry in report.budget.layers for name in entry.bytes} > {"float"}
    assert next(entry for entry in report.passes if entry.name == "qdora").changed


@pytest.mark.ort
def test_the_choice_can_be_pinned(files: Path, sized: Path, tmp_path: Path) -> None:
    assert compiled(files, tmp_path / "pinned", "--recipe", str(sized / "chosen.toml")) == 0
    assert (tmp_path / "pinned" / "model.onnx").read_bytes() == (sized / "model.onnx").read_bytes()


@pytest.mark.ort
def test_an_accuracy_is_met_with_fewer_bytes(files: Path, sized: Path, tmp_path: Path) -> None:
    accuracy = min(figures["output"].sqnr_db for figures in report_of(sized).outputs.values())
    assert compiled(files, tmp_path / "fine", "--budget", f"sqnr_db>={accuracy + 10}") == 0
    fine = report_of(tmp_path / "fine")
    assert report_of(sized).sizes.files["model.onnx"] < fine.sizes.files["model.onnx"]
    assert fine.sizes.files["model.onnx"] < 0.5 * fine.sizes.float_parameters  # not simply left in float


@pytest.mark.ort
def test_what_nothing_meets_fails_and_says_what_came_nearest(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiled(files, tmp_path / "out", "--budget", "size<=0.01") == 3
    error = capsys.readouterr().err
    assert "no bits for the layers meet --budget size<=0.01: these come nearest" in error
    assert re.search(r"gate failed: size_ratio<=0.01 \(is 0\.\d+ in onnxruntime\)", error)
    report = report_of(tmp_path / "out")
    assert report.budget is not None
    assert not report.budget.met


@pytest.mark.ort
def test_layers_that_the_recipe_pins_stay(files: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('skip = ["0"]\n[[layers]]\nmatch = "4"\nbits = 8\n')
    assert compiled(files, tmp_path / "out", "--recipe", str(recipe), "--budget", "size<=0.45") == 0
    report = report_of(tmp_path / "out")
    assert report.budget is not None
    assert [entry.name for entry in report.budget.layers] == ["2"]
    assert {entry.name: entry.format for entry in report.layers}["0"] == "float32"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--passes", "cle", "--budget", "size<=0.3"), "no pass of the recipe quantizes weights"),
        (("--skip", "*", "--budget", "size<=0.3"), "there is no layer to choose bits for"),
        (("--budget", "size>=0.3"), "is no bound to stay within"),
    ],
)
@pytest.mark.ort
def test_nothing_to_choose_is_said(
    files: Path, tmp_path: Path, flags: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiled(files, tmp_path / "out", *flags) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

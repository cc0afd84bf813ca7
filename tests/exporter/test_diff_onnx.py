"""`qexport diff` from the command line: two output folders, and another tool's ONNX file against one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporter.cli import run

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt2, data.npz, other.npz, and their outputs at 8 bits (`good`) and 2 bits (`bad`)."""
    folder = tmp_path_factory.mktemp("diff")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (torch.randn(4, 16),), dynamic_shapes=batch), folder / "model.pt2")
    torch.save(module.state_dict(), folder / "weights.pt")
    for seed, name in enumerate(("data", "other")):
        values = np.random.default_rng(seed).standard_normal((100, 16), dtype=np.float32)
        np.savez(folder / f"{name}.npz", input=values)
    for name, bits in (("good", 8), ("bad", 2)):
        flags = ["--passes", f"act-quant,rtn:bits={bits}:group_size=-1", "--out", str(folder / name), "--quiet"]
        assert run([str(folder / "model.pt2"), "--calib", str(folder / "data.npz"), *flags]) == 0
    return folder


def written(
    files: Path, path: Path, name: str = "input", rows: int | str = "n", width: int = 16, scale: float = 1.0
) -> Path:
    """The model as another tool might write it: its first weight rounded to 1 / 64, if `scale` is 1."""
    weights = {key: value.numpy() for key, value in torch.load(files / "weights.pt").items()}
    weights["0.weight"] = scale * np.round(weights["0.weight"] * 64) / 64
    nodes = [
        helper.make_node("Gemm", [name, "0.weight", "0.bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2.weight", "2.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, 4])],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def sources(files: Path, calib: str = "data.npz") -> list[str]:
    return ["--model", str(files / "model.pt2"), "--calib", str(files / calib)]


def test_folders_are_compared_and_gates_decide(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = str(files / "good"), str(files / "bad")
    assert run(["diff", good, bad]) == 0
    assert "WORSE" in capsys.readouterr().out
    out = tmp_path / "diff.md"
    assert run(["diff", good, bad, "--gate", "sqnr_db.drop<=3", "--out", str(out)]) == 3
    assert "**FAILED**" in out.read_text(encoding="utf-8")
    assert run(["diff", bad, good, "--gate", "sqnr_db.drop<=3", "--gate", "regressions==0"]) == 0
    assert run(["diff", good, f"{good}/report.json", "--gate", "regressions==0"]) == 0


def test_json_goes_to_stdout(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", str(files / "good"), str(files / "bad"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {change["verdict"] for change in data["outputs"] if change["figure"] == "sqnr_db"} == {"worse"}
    assert [layer["name"] for layer in data["layers"]] == ["0", "2"]


def test_another_tools_file_is_run_on_the_same_samples(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(files, tmp_path / "theirs.onnx")
    assert run(["diff", str(path), str(files / "bad"), *sources(files), "--json", "--gate", "regressions==0"]) == 3
    data = json.loads(capsys.readouterr().out)
    (change,) = [entry for entry in data["outputs"] if entry["figure"] == "sqnr_db"]
    assert change["where"].startswith("onnxruntime ")
    # Steps of 1/64 in weights of +-1/4: uniform noise of variance (1/64)^2 / 12 against (1/4)^2 / 3 is -30 dB. Only the
    # first of two layers has it, and both have float biases: a few dB above.
    assert 27 < change["old"] < 36
    assert change["verdict"] == "worse"
    assert data["sizes"]["model.onnx"][0] == path.stat().st_size
    assert any("taken in order: logits is" in remark for remark in data["remarks"])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_file_with_a_fixed_batch_is_fed_in_such(
    files: Path, tmp_path: Path, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(files, tmp_path / "fixed.onnx", rows=rows)
    assert run(["diff", str(path), str(files / "good"), *sources(files), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "x"}, "takes x, but the model takes input"),
        ({"width": 8}, "input input is float32 [any, 8], but the samples are float32 [20, 16]"),
        ({"rows": 7}, "takes batches of 7, which 20 held-out samples do not make up"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    files: Path, tmp_path: Path, change: dict[str, object], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(files, tmp_path / "theirs.onnx", **change)  # type: ignore[arg-type]  # each value fits its key
    assert run(["diff", str(path), str(files / "good"), *sources(files)]) == 2
    assert line in capsys.readouterr().err


Edit = Callable[[Path, Path], list[str]]


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda files, path: [str(path), str(files / "good")], "give --model, --calib and --factory"),
        (
            lambda files, path: [str(path), str(files / "good"), *sources(files, "other.npz")],
            "not the samples that NEW",
        ),
        (lambda files, path: [str(path), str(path), *sources(files)], "cannot be read as a report"),
        (lambda files, path: [str(files / "data.npz"), str(files / "good")], "neither a report, an output folder nor"),
        (lambda files, path: [str(files), str(files / "good")], "it has no report.json"),
        (lambda files, path: [str(files / "none"), str(files / "good")], "no such file or folder"),
        (lambda files, path: [str(files / "bad"), str(files / "good"), "--gate", "sqnr<=1"], "unknown difference"),
    ],
)
def test_bad_usage_is_one_line(
    files: Path, tmp_path: Path, edit: Edit, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(files, tmp_path / "theirs.onnx")
    assert run(["diff", *edit(files, path)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_another_model_is_refused(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    other = tmp_path / "other.pt2"
    torch.export.save(torch.export.export(module, (torch.randn(4, 16),), dynamic_shapes=batch), other)
    path = written(files, tmp_path / "theirs.onnx")
    flags = ["--model", str(other), "--calib", str(files / "data.npz")]
    assert run(["diff", str(path), str(files / "good"), *flags]) == 2
    assert "is not that of the model NEW was made of" in capsys.readouterr().err

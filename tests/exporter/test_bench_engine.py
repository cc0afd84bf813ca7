"""`qexport bench` of engines, on a GPU that is played: what is timed with what, and what is said where it cannot be."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import exporter.bench
import exporter.bench_engine
from exporter.cli import run
from exporter.report_files import write_reports
from runtimes.base import Artifact
from runtimes.trt import MODULES, TensorRT
from tests.exporter.render.reports import SMALL
from tests.runtimes.gpu_stand_in import ROWS, Gpu, install

FLOAT_S, QUANTIZED_S = 0.004, 0.001
"""Seconds of the engines, which is what their files hold."""


def write_graph(path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def make_output(out: Path, seconds: float | None, flavor: str | None = "rtx") -> Path:
    """An output folder of --target trt: `seconds` None is without an engine, `flavor` None one that was built later."""
    (out / "trt").mkdir(parents=True)
    write_graph(out / "trt" / "model.onnx")
    (out / "trt" / "build.json").write_text("{}")
    (out / "manifest.json").write_text("{}")
    write_reports(out, dataclasses.replace(SMALL, engine={"flavor": flavor} if flavor else {}), {})
    if seconds is not None:
        (out / "model.engine").write_text(str(seconds))
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return make_output(tmp_path / "out", QUANTIZED_S)


@pytest.fixture
def in_float(tmp_path: Path) -> Path:
    return make_output(tmp_path / "float", FLOAT_S)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """TensorRT for RTX, and the time that its engines take."""
    gpu = install(monkeypatch, MODULES["rtx"])
    monkeypatch.setattr(exporter.bench, "time", SimpleNamespace(perf_counter=lambda: gpu.seconds))
    return gpu


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_engines_are_timed_without_copies_and_the_report_is_given_the_ratio(
    gpu: Gpu, out: Path, in_float: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(out), "--float", str(in_float), "--batch", "2", "--batch", "8", "--rounds", "3"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["runtime"], found["threads"], found["rounds"]) == ("rtx", None, 3)
    assert [timing["batch"] for timing in found["timings"]] == [2, 8]
    for timing in found["timings"]:  # sums of seconds in float64: a copy, which takes a second, would be seen
        assert timing["float_s"] == pytest.approx(FLOAT_S, rel=1e-9)
        assert timing["quantized_s"] == pytest.approx(QUANTIZED_S, rel=1e-9)
    assert gpu.loaded == ["tensorrt_rtx"] * 2
    assert gpu.blocks
    assert sorted(gpu.freed) == sorted(gpu.blocks)
    assert json.loads((out / "timings.json").read_text(encoding="utf-8"))["latency"] == found
    assert "TensorRT for RTX, inputs and outputs on the GPU" in (out / "report.html").read_text(encoding="utf-8")

    assert run(words) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines()[1:3]] == ["4.00", "4.00"]
    assert "medians of 3 runs of each in turns, TensorRT for RTX, inputs and outputs on the GPU" in shown


@pytest.mark.parametrize("given", ["float", "float/trt", "float/model.engine"])
def test_the_float_engine_may_be_given_as_a_folder_or_a_file(
    gpu: Gpu, out: Path, in_float: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(out), "--float", str(out.parent / given), "--batch", "1", "--rounds", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "4.00"


def test_a_bundle_that_was_carried_alone_is_timed_in_the_flavor_that_builds_here(
    gpu: Gpu, in_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter.bench_engine, "available_flavor", lambda asked: "rtx" if asked == "auto" else None)
    bundle = tmp_path / "carried"
    make_output(tmp_path / "elsewhere", None)
    (tmp_path / "elsewhere" / "trt").rename(bundle)
    (bundle / "model.engine").write_text(str(QUANTIZED_S))
    before = everything(bundle)
    assert run(["bench", str(bundle), "--float", str(in_float), "--batch", "1", "--rounds", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "4.00"
    assert everything(bundle) == before


def test_the_flavor_of_the_report_runs_the_engine_and_a_given_one_comes_first(
    tmp_path: Path, in_float: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_output(tmp_path / "out", QUANTIZED_S, "tensorrt")
    words = ["bench", str(out), "--float", str(in_float), "--batch", "1", "--rounds", "3"]
    assert install(monkeypatch, MODULES["rtx"]).loaded == []
    full = install(monkeypatch, MODULES["tensorrt"])
    assert run(words) == 0
    assert full.loaded == ["tensorrt"] * 2
    rtx = install(monkeypatch, MODULES["rtx"])
    assert run([*words, "--trt-flavor", "rtx"]) == 0
    assert rtx.loaded == ["tensorrt_rtx"] * 2
    assert "TensorRT for RTX" in capsys.readouterr().out


@pytest.mark.ort
def test_of_both_targets_the_artifact_of_the_kind_of_the_float_network_is_timed(
    out: Path, in_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = install(monkeypatch, MODULES["rtx"])
    (tmp_path / "onnx").mkdir()
    for folder in (out, tmp_path / "onnx"):
        write_graph(folder / "model.onnx")
    words = ["bench", str(out), "--batch", "1", "--rounds", "3"]
    for given in ("float", "float/model.engine"):
        assert run([*words, "--float", str(tmp_path / given)]) == 0
        assert "TensorRT for RTX" in capsys.readouterr().out
    gpu.loaded.clear()
    for given in ("onnx", "onnx/model.onnx"):
        assert run([*words, "--float", str(tmp_path / given)]) == 0
        assert "1 thread" in capsys.readouterr().out
    assert gpu.loaded == []
    assert "no such file" in refused([*words[1:], "--float", str(tmp_path / "nowhere.onnx")], 2, out, capsys)


# What cannot be timed, in one line, with nothing written.


def refused(words: list[str], code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = everything(folder)
    assert run(["bench", *words]) == code
    assert everything(folder) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_engine_alone_is_refused_with_the_command_that_makes_the_other(
    gpu: Gpu, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([str(out)], 2, out, capsys)
    assert "timed beside a float engine" in line
    assert "`qexport MODEL --passes fold-bn --target trt --out FLOAT` and give --float FLOAT" in line
    assert gpu.loaded == []


def test_without_the_library(
    out: Path, in_float: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, MODULES["rtx"], None)
    line = refused([str(out), "--float", str(in_float)], 4, out, capsys)
    assert f"{out / 'model.engine'}: tensorrt_rtx is not installed; pip install 'qexport[trt-rtx]'" in line


def test_without_a_gpu(
    gpu: Gpu, out: Path, in_float: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the driver is the real one, which is not there

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, MODULES["rtx"], SimpleNamespace())
    monkeypatch.setattr("ctypes.CDLL", no_library)
    line = refused([str(out), "--float", str(in_float)], 4, out, capsys)
    assert "no NVIDIA driver on this machine; run the engine where the GPU is" in line


def test_where_nothing_says_the_flavor_and_no_tensorrt_works(
    tmp_path: Path, in_float: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter.bench_engine, "available_flavor", lambda asked: None)
    out = make_output(tmp_path / "out", QUANTIZED_S, None)
    line = refused([str(out), "--float", str(in_float)], 4, out, capsys)
    assert "no TensorRT works on this machine; see `qexport doctor`" in line


@pytest.mark.parametrize(("which", "code"), [("out", 4), ("float", 2)])
def test_an_engine_that_is_refused_is_named(
    gpu: Gpu,
    out: Path,
    in_float: Path,
    which: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = TensorRT.load

    def load(self: TensorRT, artifact: Artifact) -> object:
        gpu.reject = "built for another GPU" if artifact.model.parent.name == which else ""
        return real(self, artifact)

    monkeypatch.setattr(TensorRT, "load", load)
    line = refused([str(out), "--float", str(in_float)], code, out, capsys)
    assert (
        f"{out.parent / which / 'model.engine'}: tensorrt_rtx cannot load model.engine: built for another GPU" in line
    )


def test_a_size_outside_the_profile(gpu: Gpu, out: Path, in_float: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([str(out), "--float", str(in_float), "--batch", str(ROWS + 1)], 2, out, capsys)
    assert (
        "input x has shape [9, 3]; the engine takes [1, 3] to [8, 3]; does the model take inputs of this size" in line
    )
    assert "give --batch and --length" in line


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("float/trt/model.onnx", "model.onnx: is no engine"),
        ("empty", "empty: is no engine"),
        ("unbuilt", "has no model.engine yet; build it on the machine that has the GPU: qexport build"),
    ],
)
def test_a_float_engine_that_is_none(
    gpu: Gpu, out: Path, in_float: Path, given: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out.parent / "empty").mkdir()
    make_output(out.parent / "unbuilt", None)
    assert why in refused([str(out), "--float", str(out.parent / given)], 2, out, capsys)


def test_an_output_whose_engine_is_not_built_yet(
    gpu: Gpu, in_float: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_output(tmp_path / "out", None)
    line = refused([str(out), "--float", str(in_float)], 2, out, capsys)
    assert f"{out}: has no model.engine yet; build it on the machine that has the GPU: qexport build {out}" in line


def test_an_engine_without_its_bundle(gpu: Gpu, out: Path, in_float: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "trt" / "build.json").unlink()
    line = refused([str(out), "--float", str(in_float)], 2, out, capsys)
    assert "holds no TensorRT engine with its bundle (trt/build.json); give the output folder of --target trt" in line


@pytest.mark.parametrize(
    ("name", "why"), [("trt/model.onnx", "is damaged"), ("report.json", "its report cannot be read")]
)
def test_damaged_files(
    gpu: Gpu, out: Path, in_float: Path, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / name).write_bytes(np.arange(9, dtype=np.uint8).tobytes())
    assert why in refused([str(out), "--float", str(in_float)], 2, out, capsys)

"""The command line: what it prints where, its exit codes, and how it ends when it is told to stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exporter.compile
import exporter.engine
import qexport
from exporter.cli import run
from exporter.open_out import load
from exporter.recipe import Recipe
from exporter.report import Report

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ort


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.second(torch.relu(self.first(x)))
        return value


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt2, data.npz and a finished output `out` of them."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Small().eval(), (), {"x": torch.randn(4, 16)}, dynamic_shapes=batch)
    torch.export.save(program, folder / "model.pt2")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((40, 16), dtype=np.float32))
    assert compiled(folder, folder / "out", "--gate", "sqnr_db>=20") == 0
    return folder


def compiled(folder: Path, out: Path, *flags: str) -> int:
    return run([str(folder / "model.pt2"), "--calib", str(folder / "data.npz"), "--out", str(out), *flags])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Compiling.


def test_an_output_is_whole(files: Path) -> None:
    whole = {"model.onnx", "model.safetensors", "report.json", "report.md", "manifest.json", "timings.json"}
    whole |= {"report.html", "junit.xml"}
    assert whole <= names(files / "out")
    report = Report.from_json((files / "out" / "report.json").read_text(encoding="utf-8"))
    assert report.gates_passed
    assert report.recipe["passes"] == "cle,gptaq"
    assert report.calibration["samples"] == 32
    assert report.calibration["held_out"] == 8


def test_the_same_command_writes_the_same_bytes(files: Path, tmp_path: Path) -> None:
    assert compiled(files, tmp_path / "again", "--gate", "sqnr_db>=20", "--quiet") == 0
    for name in ("model.onnx", "model.safetensors", "manifest.json", "report.json", "report.md", "junit.xml"):
        assert (tmp_path / "again" / name).read_bytes() == (files / "out" / name).read_bytes(), name


def test_results_go_to_stdout_and_the_rest_to_stderr(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(files / "model.pt2"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "against float" in printed.out
    assert f"written to {tmp_path / 'out'}" in printed.out
    assert printed.err.startswith("warning: no calibration data")


def test_quiet_says_nothing(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled(files, tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_gate_that_fails_is_3_and_everything_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiled(files, tmp_path / "out", "--gate", "sqnr_db>=200") == 3
    assert "gate failed: sqnr_db>=200" in capsys.readouterr().err
    assert names(files / "out") == names(tmp_path / "out")


def test_a_figure_that_nobody_measured_is_4(files: Path, tmp_path: Path) -> None:
    assert compiled(files, tmp_path / "out", "--gate", "metric.accuracy>=0.9", "--quiet") == 4
    assert "model.onnx" in names(tmp_path / "out")


def test_a_target_that_cannot_be_completed_is_4_and_the_line_says_how_to_finish(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter.engine, "available_flavor", lambda flavor: None)
    assert compiled(files, tmp_path / "out", "--target", "trt") == 4
    assert "qexport build" in capsys.readouterr().err
    assert {"model.onnx", "build.json"} <= names(tmp_path / "out" / "trt")


def test_a_recipe_in_a_file_does_what_flags_do(files: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = "rtn"\nskip = ["second"]\n[[layers]]\nmatch = "first"\nbits = 4\n')
    assert compiled(files, tmp_path / "out", "--recipe", str(recipe), "--quiet") == 0
    report = Report.from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    layers = {layer.name: layer for layer in report.layers}
    assert layers["second"].format == "float32"
    assert "4" in layers["first"].format


def test_an_input_may_be_called_as_python_calls_something(tmp_path: Path) -> None:
    """fx renames a node called input; the artifact, the data and the report keep the name."""
    torch.manual_seed(0)
    data = torch.randn(40, 16)
    out = tmp_path / "out"
    qexport.compile_model(nn.Linear(16, 4), {"input": data[:4]}, Recipe(), calibration={"input": data}, out=out)
    assert load(out).inputs == ("input",)


# Python.


def test_the_python_face_does_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(40, 16)
    report = qexport.compile_model(
        Small(), {"x": data[:4]}, Recipe(passes="rtn", target=["onnx"]), calibration={"x": data}, out=tmp_path / "out"
    )
    session = qexport.load(tmp_path / "out")
    found = session.run({"x": data[:3]})
    assert report.layers[0].name == "first"
    assert found[session.outputs[0]].shape == (3, 4)
    with pytest.raises(qexport.InputError, match="missing x"):
        session.run({})


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(qexport.InputError, match=r"has no model\.engine"):
        load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(qexport.InputError, match="is damaged"):
        load(tmp_path)


# Other commands.


def test_inspect_shows_layers_files_and_gates(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(files / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("first", "second", "model.onnx", "sqnr_db>=20", "passed", "2 layers"))
    assert "changed" not in shown


def test_inspect_tells_files_that_are_not_as_they_were_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiled(files, tmp_path / "out", "--quiet") == 0
    with (tmp_path / "out" / "model.onnx").open("ab") as file:
        file.write(b"x")
    (tmp_path / "out" / "model.safetensors").unlink()
    run(["inspect", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "changed" in shown
    assert "missing" in shown


def test_inspect_of_anything_else_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "nothing")]) == 2
    assert run(["inspect", str(tmp_path)]) == 2
    (tmp_path / "report.json").write_text("{}")
    assert run(["inspect", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no such folder" in lines[0]
    assert "it has no report.json" in lines[1]
    assert "not a qexport report" in lines[2]


def test_bench_compares_with_float_in_one_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(files / "out"), "--rounds", "3", "--batch", "2", "--batch", "5"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:3]] == ["2", "5"]
    latency = json.loads((files / "out" / "timings.json").read_text(encoding="utf-8"))["latency"]
    assert [timing["batch"] for timing in latency["timings"]] == [2, 5]
    assert "as fast as float" in (files / "out" / "report.html").read_text(encoding="utf-8")
    assert run(["bench", str(files)]) == 2
    assert "has no model.onnx" in capsys.readouterr().err


def test_passes_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes"]) == 0
    assert "gptq" in capsys.readouterr().out
    assert run(["passes", "gptq"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("group_size", "128", "arXiv 2210.17323", "fold-bn"))
    assert run(["passes", "gtpq"]) == 2
    assert "did you mean gptq" in capsys.readouterr().err


def test_build_names_what_is_no_bundle(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(files)]) == 2
    assert "is no TensorRT bundle" in capsys.readouterr().err


@pytest.mark.tensorrt
def test_build_finishes_a_bundle_into_its_output(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(exporter.engine, "available_flavor", lambda flavor: None)
        assert compiled(files, out, "--target", "trt", "--quiet") == 4
    capsys.readouterr()
    assert run(["build", str(out / "trt"), "--trt-flavor", "rtx", "--trt-arch", "sm80"]) == 0
    assert "(rtx)" in capsys.readouterr().out
    assert "model.engine" in json.loads((out / "manifest.json").read_text(encoding="utf-8"))["files"]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["engine"]["flavor"] == "rtx"
    assert report["sizes"]["files"]["model.engine"] == (out / "model.engine").stat().st_size
    assert run(["build", str(out), "--trt-flavor", "rtx"]) == 2
    assert "has an engine already" in capsys.readouterr().err


# Usage.


def test_help_shows_commands_and_the_options_of_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("MODEL [OPTIONS]", "doctor", "--passes", "--trust-model"))
    assert run([]) == 2
    assert "MODEL [OPTIONS]" in capsys.readouterr().err
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"qexport {qexport.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model.pt", "--pases", "cle"], "No such option '--pases'"),
        (["--passes", "cle"], "no MODEL"),
        (["model.pt", "other.pt"], "unexpected extra argument"),
        (["model.pt", "--seed", "x"], "'x' is not a valid integer"),
        (["passes", "gptq", "rtn"], "unexpected extra argument"),
        (["bench"], "Missing argument 'OUT'"),
    ],
)
def test_bad_usage_is_one_line_and_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert said in err


def test_a_file_may_be_called_like_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("passes").write_bytes(b"")
    assert run(["./passes"]) == 2
    assert "passes: the file is empty" in capsys.readouterr().err


# How it ends.


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def fail_with(error: BaseException) -> None:
        def compile_path(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(exporter.compile, "compile_path", compile_path)

    return fail_with


def test_a_fault_of_ours_is_1_and_says_how_to_report_it(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ZeroDivisionError("division\nby zero"))
    assert run(["model.pt"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ZeroDivisionError: division by zero; this is a bug in qexport" in err
    assert run(["model.pt", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130_without_a_traceback(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(KeyboardInterrupt())
    assert run(["model.pt"]) == 130
    assert (
        capsys.readouterr().err.strip() == "error: interrupted, nothing was written; the same command goes on from here"
    )


def heeding_signals() -> None:
    """A shell has its background jobs ignore Ctrl-C, and all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_real_run_with_nothing_half_written(files: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\ndef samples():\n    pathlib.Path('reached').touch()\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "exporter.cli", str(files / "model.pt2"), "--calib", "slow:samples"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--out", "parent/out"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_signals,
    ) as child:
        while not (tmp_path / "reached").exists():
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        _, err = child.communicate()
    assert child.returncode == 130
    *stages, last = [line for line in err.splitlines() if line.strip()]  # a stage that took long is told of
    assert last == "error: interrupted, nothing was written; the same command goes on from here"
    assert not [line for line in stages if not re.fullmatch(r"[\w ]+: \d+ s", line)]
    assert names(tmp_path) - {"__pycache__"} == {"slow.py", "reached"}


def test_help_needs_no_torch() -> None:
    script = "import sys, exporter.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_reader_that_stops_reading_is_no_error() -> None:
    script = "from exporter.cli import main; main()"
    command = [sys.executable, "-c", script, "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr

"""Bad input through the command line: one line on stderr, exit code 2, nothing written."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.cli import run

ROOT = Path(__file__).resolve().parents[2]
FACTORIES = """
import torch
def linear(): return torch.nn.Linear(4, 2)
def fails(): raise RuntimeError("no weights\\nhere")
def exits(): raise SystemExit(0)
def number(): return 3
class Convolution(torch.nn.Module): pass
def ones(): return {"x": torch.ones(8, 4)}
"""


class Free(nn.Module):
    """Pickled by reference to a class of the tests."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of factories and model.safetensors, good weights of `linear`."""
    (tmp_path / "factories_of_the_user.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories_of_the_user", raising=False)
    save_file(weights(), "model.safetensors")
    return tmp_path


def weights(**changes: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.ones(2, 4), "bias": torch.zeros(2)} | changes


def refused(here: Path, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command line is refused with; nothing appears in the working directory."""
    before = sorted(path.relative_to(here) for path in here.rglob("*") if "__pycache__" not in path.parts)
    capsys.readouterr()
    code = run(args)
    out, err = capsys.readouterr()
    after = sorted(path.relative_to(here) for path in here.rglob("*") if "__pycache__" not in path.parts)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert after == before
    return err


def refused_model(here: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    return refused(here, capsys, "model", *flags)


# MODEL.


def make_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4)), path)


def make_onnx(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def make_truncated(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-200])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (make_truncated, "truncated or damaged"),
    "random": (lambda path: path.write_bytes(bytes(range(97, 250)) * 8), "not a model that qexport knows"),
    "torchscript": (make_torchscript, "TorchScript"),
    "onnx": (make_onnx, "an ONNX file is what qexport writes"),
    "module": (lambda path: torch.save(Free(), path), "--trust-model"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle that torch.save did not write"),
    "state_dict": (lambda path: torch.save(weights(), path), "--factory"),
    "folder": (lambda path: path.mkdir(), "config.json"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates the TorchScript that a user may bring
def test_what_is_no_model(here: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    make, said = MODELS[kind]
    make(here / "model")
    assert said in refused_model(here, capsys)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("fails", "fails failed: RuntimeError: no weights"),
        ("exits", "exits failed: SystemExit"),
        ("number", "returned a int, not a torch.nn.Module"),
        ("nothing", "has no nothing"),
    ],
)
def test_a_factory_that_makes_no_module(
    here: Path, capsys: pytest.CaptureFixture[str], factory: str, said: str
) -> None:
    args = ("model.safetensors", "--factory", f"factories_of_the_user:{factory}")
    assert said in refused(here, capsys, *args)


def test_a_factory_that_cannot_be_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "importing nowhere failed" in refused(here, capsys, "model.safetensors", "--factory", "nowhere:make")
    assert "not of the form pkg.mod:function" in refused(here, capsys, "model.safetensors", "--factory", "linear")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.ones(2, 4)}, "missing: bias"),
        (weights(scale=torch.ones(2)), "not in the module: scale"),
        (weights(weight=torch.ones(3, 4)), "of another shape: weight [3, 4] for [2, 4]"),
        (weights(bias=torch.tensor([0.0, float("nan")])), "bias holds 1 NaN or infinite values of 2"),
        (weights(weight=torch.full((2, 4), float("inf"))), "weight holds 8 NaN or infinite values of 8"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite(
    here: Path, capsys: pytest.CaptureFixture[str], state: dict[str, Tensor], said: str
) -> None:
    save_file(state, here / "model")
    assert said in refused_model(here, capsys, "--factory", "factories_of_the_user:linear")


# Calibration data and inputs.

LINEAR = ("model.safetensors", "--factory", "factories_of_the_user:linear")


def exported(here: Path) -> str:
    torch.export.save(
        torch.export.export(
            nn.Linear(4, 2).eval(),
            (),
            {"input": torch.ones(2, 4)},
            dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}},
        ),
        here / "model.pt2",
    )
    return "model.pt2"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.ones((8, 4), np.float32)}, "the model has no input 'y'"),
        ({"input": np.ones((8, 5), np.float32)}, "input has shape [8, 5], the model takes [samples, 4]"),
        ({"input": np.ones((8, 4), np.int64)}, "input is int64, the model takes float32"),
        ({"input": np.ones((0, 4), np.float32)}, "input has no samples"),
        ({"input": np.full((8, 4), np.nan, np.float32)}, "input holds NaN in 8 of 8 samples"),
        ({"input": np.full((8, 4), np.inf, np.float32)}, "input holds infinity in 8 of 8 samples"),
        ({"input": np.array(["a"])}, "holds an array of type <U1"),
    ],
)
def test_samples_that_do_not_fit(
    here: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, np.ndarray], said: str
) -> None:
    model = exported(here)
    np.savez("data.npz", **arrays)
    assert f"--calib data.npz: {said}" in refused(here, capsys, model, "--calib", "data.npz")


def test_samples_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = exported(here)
    assert "no such file" in refused(here, capsys, model, "--calib", "nothing.npz")
    Path("empty").write_bytes(b"")
    assert "the file is empty" in refused(here, capsys, model, "--calib", "empty")
    said = refused(here, capsys, model, "--calib", "factories_of_the_user:fails")
    assert "fails failed: RuntimeError: no weights here" in said
    assert "the model has no input 'x'" in refused(here, capsys, model, "--calib", "factories_of_the_user:ones")


def test_a_module_needs_to_be_told_its_inputs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--input NAME=SHAPE" in refused(here, capsys, *LINEAR)
    assert "could not capture Linear" in refused(here, capsys, *LINEAR, "--input", "input=2x5")
    said = refused(here, capsys, *LINEAR, "--input", "4", "--input", "4")
    assert "Linear takes 1 inputs" in said


# Flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--passes", "cle,gtpq"), "unknown pass 'gtpq'; did you mean gptq"),
        (("--passes", "gptq:bit=4"), "gptq has no option 'bit'; did you mean bits"),
        (("--passes", "gptq:bits=four"), "'four' is not a whole number"),
        (("--target", "tensorrt"), "--target: 'tensorrt' is not one of onnx, trt"),
        (("--gate", "sqnr_db=>20"), "is not a gate"),
        (("--gate", "sqnr>=20"), "unknown figure 'sqnr'; did you mean sqnr_db"),
        (("--provider", "gpu"), "'gpu' is not one of cpu, cuda, tensorrt"),
        (("--calib-samples", "0"), "--calib-samples: 0 is less than 1"),
        (("--input", "input=ax4"), "'ax4' is not a shape"),
        (("--dynamic", "input"), "'input' is not NAME:AXIS[=label]"),
        (("--recipe", "nothing.toml"), "nothing.toml: cannot be read as TOML"),
        (("--dtype", "float16"), "target onnx has no float16"),
    ],
)
def test_flags_that_mean_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert said in refused(here, capsys, *LINEAR, "--input", "input=2x4", *flags)


def test_dynamic_axes_must_be_the_models(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*LINEAR, "--input", "input=2x4")
    assert "--dynamic" in refused(here, capsys, *flags, "--dynamic", "inputs:0")
    assert "--dynamic" in refused(here, capsys, *flags, "--dynamic", "input:7")
    assert "--dynamic" in refused(here, capsys, exported(here), "--dynamic", "input:0")


def test_passes_that_a_target_cannot_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*LINEAR, "--input", "input=2x4", "--target", "trt")
    assert "per-token" in refused(here, capsys, *flags, "--passes", "gptaq:activations=token")


# The output folder.


def test_a_folder_that_is_there_or_cannot_be(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*LINEAR, "--input", "input=2x4", "--out")
    (here / "out").mkdir()
    (here / "file").write_text("mine")
    assert "exists already" in refused(here, capsys, *flags, "out")
    assert "exists already" in refused(here, capsys, *LINEAR, "--input", "input=2x4")  # out is the default
    assert "is a file" in refused(here, capsys, *flags, "file", "--force")
    assert "Not a directory" in refused(here, capsys, *flags, "file/out")
    (here / "out" / "holiday.jpg").write_text("mine")
    assert "not an output of qexport" in refused(here, capsys, *flags, "out", "--force")


def test_a_folder_that_may_not_be_written_to(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *arguments: object) -> None:  # root, as whom tests may run, is denied nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    said = refused(here, capsys, *LINEAR, "--input", "input=2x4", "--out", "out")
    assert "--out out: cannot be written: Permission denied" in said


@pytest.mark.ort
@pytest.mark.parametrize("limit", [1000, 12_000])
def test_a_disk_that_fills_up_leaves_nothing(here: Path, limit: int) -> None:
    """A limit on the size of files stands in for the full disk: the first write fails, or one in its middle."""
    script = (
        "import sys, resource, signal, torch, onnxruntime, torch.onnx, onnxscript\n"
        "sys.dont_write_bytecode = True\n"
        "from exporter.cli import run\n"
        "import exporter.compile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    save_file({"weight": torch.randn(200, 100), "bias": torch.zeros(200)}, here / "big.safetensors")
    (here / "big_model.py").write_text("import torch\ndef big(): return torch.nn.Linear(100, 200)\n")
    before = sorted(path.name for path in here.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", script, "big.safetensors", "--factory", "big_model:big", "--input", "input=2x100"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "--out out: could not be written, and nothing was: the file is too big" in done.stderr
    assert sorted(path.name for path in here.iterdir()) == before

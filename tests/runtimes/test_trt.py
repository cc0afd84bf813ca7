"""TensorRT sessions against a stand-in for the engine and the driver: nothing here meets a GPU."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes import trt
from runtimes.base import Artifact, RuntimeFault
from runtimes.trt import TensorRT
from tests.runtimes.gpu_stand_in import Context, Engine, Gpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    path = tmp_path / "model.engine"
    path.write_text(str(SECONDS))
    return Artifact("tensorrt", path, ("x",), ("y",))


SECONDS = 0.25
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_runs_and_frees_what_it_allocated(gpu, artifact):
    session = TensorRT().load(artifact)
    np.testing.assert_array_equal(session.run({"x": X.T.copy().T})["y"], 2 * X)  # also when not contiguous
    assert sorted(gpu.freed) == sorted(gpu.blocks)


def test_a_prepared_run_copies_and_allocates_nothing_and_all_is_freed_at_the_end(gpu, artifact):
    session = TensorRT().load(artifact)
    with session.prepared({"x": X}) as run:
        before = gpu.seconds
        run()
        run()
        assert gpu.seconds - before == 2 * SECONDS
        assert gpu.synchronized
        assert not gpu.freed
        (y,) = (block for block in gpu.blocks.values() if block != X.tobytes())
        np.testing.assert_array_equal(np.frombuffer(y, np.float32).reshape(X.shape), 2 * X)
    assert sorted(gpu.freed) == sorted(gpu.blocks)


def test_a_failed_run_is_a_fault_and_frees_too(gpu, artifact):
    gpu.works = False
    session = TensorRT().load(artifact)
    with pytest.raises(RuntimeFault, match="failed to run"):
        session.run({"x": X})
    assert gpu.blocks
    assert sorted(gpu.freed) == sorted(gpu.blocks)


@pytest.mark.parametrize(
    ("feed", "why"),
    [
        (X.astype(np.float64), "input x is float64, the engine takes float32"),
        (np.ones((9, 3), np.float32), r"input x has shape \[9, 3\]; the engine takes \[1, 3\] to \[8, 3\]"),
    ],
)
def test_feeds_the_engine_does_not_take(gpu, artifact, feed, why):
    with pytest.raises(RuntimeFault, match=why):
        TensorRT().load(artifact).run({"x": feed})


def test_an_output_whose_shape_depends_on_data(gpu, artifact):
    gpu.shape_depends_on_data = True
    with pytest.raises(RuntimeFault, match="shape of output y depends on data"):
        TensorRT().load(artifact).run({"x": X})


def test_an_engine_of_other_inputs_and_outputs(gpu, artifact):
    gpu.tensors = ("tokens", "y")
    with pytest.raises(RuntimeFault, match="inputs and outputs tokens, y; expected x, y"):
        TensorRT().load(artifact)


def test_a_refused_engine_gives_the_librarys_reason(gpu, artifact):
    gpu.reject = "built for another GPU"
    with pytest.raises(RuntimeFault, match=r"tensorrt cannot load model\.engine: built for another GPU; name"):
        TensorRT().load(artifact)


def test_no_execution_context(gpu, artifact):
    gpu.has_context = False
    with pytest.raises(RuntimeFault, match="execution context"):
        TensorRT().load(artifact)


@pytest.mark.tensorrt
def test_the_library_has_what_the_stand_in_has():
    library = pytest.importorskip("tensorrt_rtx")
    for ours, theirs in ((Engine, library.ICudaEngine), (Context, library.IExecutionContext)):
        used = {name for name in vars(ours) if not name.startswith("_")}
        assert used
        assert used <= {*dir(theirs)}
    assert {"num_io_tensors"} <= {*dir(library.ICudaEngine)}


@pytest.mark.parametrize(("flavor", "extra"), [("tensorrt", "trt"), ("rtx", "trt-rtx")])
def test_without_the_library(artifact, monkeypatch, flavor, extra):
    monkeypatch.setitem(sys.modules, trt.MODULES[flavor], None)
    with pytest.raises(RuntimeFault, match=rf"{trt.MODULES[flavor]} is not installed.*qexport\[{extra}\]"):
        TensorRT(flavor=flavor).load(artifact)


def test_without_a_driver(artifact, monkeypatch):
    def no_library(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(RuntimeFault, match="no NVIDIA driver on this machine"):
        TensorRT().load(artifact)


def test_an_error_of_the_driver_names_the_call(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: 100))
    with pytest.raises(RuntimeFault, match="cuInit failed with error 100"):
        trt.Driver()


def test_the_driver_makes_a_stream_of_its_own(monkeypatch):
    def create(stream, flags):
        stream._obj.value = 77
        return 0

    calls = {name: lambda *arguments: 0 for name in ("cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuStreamCreate=create, **calls))
    assert trt.Driver().stream == 77

"""TensorRT sessions against a stand-in for the engine and the driver: nothing here meets a GPU."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import trt
from runtimes.base import Artifact, RuntimeFault
from runtimes.trt import TensorRT


class Memory:
    """Stands in for `trt.Driver`: addresses are keys of a dict."""

    def __init__(self, device: int = 0) -> None:
        self.blocks: dict[int, bytes] = {}
        self.freed: list[int] = []
        Memory.last = self

    last: "Memory"

    def allocate(self, size: int) -> int:
        address = 4096 * (len(self.blocks) + 1)
        self.blocks[address] = bytes(size)
        return address

    def free(self, address: int) -> None:
        self.freed.append(address)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.blocks[address] = array.tobytes()

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = np.frombuffer(self.blocks[address], array.dtype).reshape(array.shape)

    def synchronize(self) -> None:
        self.synchronized = True


class Context:
    """Runs y = 2 x for x of at most 8 rows."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.works = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x = np.frombuffer(Memory.last.blocks[self.addresses["x"]], np.float32)
        Memory.last.blocks[self.addresses["y"]] = (2 * x).tobytes()
        return self.works


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library called tensorrt whose every file is the engine above, unless `engine.reject` holds a reason."""
    state = SimpleNamespace(context=Context(), reject="")

    class ILogger:
        Severity = SimpleNamespace(ERROR=1)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            if state.reject:
                self.logger.log(3, "loading")
                self.logger.log(1, state.reject)
                return None
            return SimpleNamespace(create_execution_context=lambda: state.context, get_tensor_dtype=lambda name: "f4")

    library = SimpleNamespace(ILogger=ILogger, Runtime=Runtime, nptype=lambda dtype: dtype)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(trt, "Driver", Memory)
    return state


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return Artifact("tensorrt", path, ("x",), ("y",))


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_runs_and_frees_what_it_allocated(engine, artifact):
    session = TensorRT().load(artifact)
    np.testing.assert_array_equal(session.run({"x": X.T.copy().T})["y"], 2 * X)  # also when not contiguous
    assert sorted(Memory.last.freed) == sorted(Memory.last.blocks)
    assert Memory.last.synchronized


def test_a_failed_run_is_a_fault_and_frees_too(engine, artifact):
    engine.context.works = False
    session = TensorRT().load(artifact)
    with pytest.raises(RuntimeFault, match="failed to run"):
        session.run({"x": X})
    assert sorted(Memory.last.freed) == sorted(Memory.last.blocks)


@pytest.mark.parametrize(
    ("feed", "why"),
    [
        (X.astype(np.float64), "input x is float64, the engine takes float32"),
        (np.ones((9, 3), np.float32), r"shape \[9, 3\], outside the engine's profile"),
    ],
)
def test_feeds_the_engine_does_not_take(engine, artifact, feed, why):
    with pytest.raises(RuntimeFault, match=why):
        TensorRT().load(artifact).run({"x": feed})


def test_an_output_whose_shape_depends_on_data(engine, artifact):
    session = TensorRT().load(artifact)
    engine.context.get_tensor_shape = lambda name: (-1, 3)
    with pytest.raises(RuntimeFault, match="shape of output y depends on data"):
        session.run({"x": X})


def test_a_refused_engine_gives_the_librarys_reason(engine, artifact):
    engine.reject = "built for another GPU"
    with pytest.raises(RuntimeFault, match=r"cannot load model\.engine: built for another GPU; rebuild"):
        TensorRT().load(artifact)


def test_no_execution_context(engine, artifact):
    engine.context = None
    with pytest.raises(RuntimeFault, match="execution context"):
        TensorRT().load(artifact)


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

"""Stands in for a GPU, its driver and TensorRT: an engine is y = 2 x for x of at most 8 rows. Time passes as told.

The file of an engine holds how many seconds it takes, as text. A copy or an allocation takes a second, so that a
timing that includes one shows it.
"""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import trt

ROWS = 8
STREAM = 77
COPY_S = 1.0


@dataclasses.dataclass
class Gpu:
    """What tests look at, and what they make fail: `reject` is why engines are refused."""

    blocks: dict[int, bytes] = dataclasses.field(default_factory=dict)
    freed: list[int] = dataclasses.field(default_factory=list)
    loaded: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    reject: str = ""
    has_context: bool = True
    works: bool = True
    shape_depends_on_data: bool = False
    tensors: tuple[str, ...] = ("x", "y")
    synchronized: bool = True


class Driver:
    """In the place of `trt.Driver`: addresses are keys of a dict."""

    stream = STREAM

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def allocate(self, size: int) -> int:
        self._gpu.seconds += COPY_S
        address = 4096 * (len(self._gpu.blocks) + 1)
        self._gpu.blocks[address] = bytes(size)
        return address

    def free(self, address: int) -> None:
        assert address not in self._gpu.freed
        self._gpu.freed.append(address)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert len(self._gpu.blocks[address]) == array.nbytes
        self._gpu.seconds += COPY_S
        self._gpu.blocks[address] = array.tobytes()

    def download(self, array: np.ndarray, address: int) -> None:
        assert self._gpu.synchronized
        self._gpu.seconds += COPY_S
        array[...] = np.frombuffer(self._gpu.blocks[address], array.dtype).reshape(array.shape)

    def synchronize(self) -> None:
        self._gpu.synchronized = True


class Context:
    """Of one engine: y = 2 x."""

    def __init__(self, gpu: Gpu, seconds: float) -> None:
        self._gpu, self._seconds = gpu, seconds
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return shape[0] <= ROWS

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._shape[1:]) if self._gpu.shape_depends_on_data else self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert not {*self._addresses.values()} & {*self._gpu.freed}
        x = np.frombuffer(self._gpu.blocks[self._addresses["x"]], np.float32)
        self._gpu.blocks[self._addresses["y"]] = (2 * x).tobytes()
        self._gpu.seconds += self._seconds
        self._gpu.synchronized = False
        return self._gpu.works


class Engine:
    """The methods of TensorRT's ICudaEngine that the runtime uses."""

    def __init__(self, gpu: Gpu, seconds: float) -> None:
        self._gpu, self._seconds = gpu, seconds
        self.num_io_tensors = len(gpu.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self._gpu.tensors[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "f4"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (ROWS, 3)]

    def create_execution_context(self) -> Context | None:
        return Context(self._gpu, self._seconds) if self._gpu.has_context else None


def install(monkeypatch: pytest.MonkeyPatch, module: str = "tensorrt") -> Gpu:
    """A library called `module` and a driver, both on the GPU that is returned."""
    gpu = Gpu()

    class ILogger:
        Severity = SimpleNamespace(ERROR=1)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            if gpu.reject:
                self._logger.log(3, "loading")
                self._logger.log(1, gpu.reject)
                return None
            gpu.loaded.append(module)
            return Engine(gpu, float(data))

    library = SimpleNamespace(ILogger=ILogger, Runtime=Runtime, nptype=lambda dtype: dtype)
    monkeypatch.setitem(sys.modules, module, library)
    monkeypatch.setattr(trt, "Driver", lambda device: Driver(gpu))
    return gpu

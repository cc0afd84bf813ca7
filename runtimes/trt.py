"""TensorRT engines, on the machine that has the GPU they were built for.

Both flavors, `tensorrt` and `tensorrt_rtx`, share this interface. Buffers go through the CUDA driver library, which is
there wherever an engine can run, so nothing else has to be installed. The tests run this file against a stand-in for
the engine and the driver: it has not met a GPU yet.
"""

import contextlib
import ctypes
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, Literal

import numpy as np

from runtimes.base import Array, Artifact, Runtime, RuntimeFault, Session

MODULES: Mapping[str, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}


class Driver:
    """The few calls of the CUDA driver that move data to a GPU and back."""

    def __init__(self, device: int = 0) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeFault("no NVIDIA driver on this machine", fix="run the engine where the GPU is") from error
        context = ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
        self._call("cuCtxSetCurrent", context)
        # On the default stream TensorRT would wait for the whole device more often than needed. Copies go by the
        # default stream, and a stream created without flags waits for those.
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        self.stream = stream.value or 0

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give back what `allocate` returned."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _pointer(array), ctypes.c_size_t(array.nbytes))

    def download(self, array: Array, address: int) -> None:
        """Fill a C-contiguous array from the GPU."""
        self._call("cuMemcpyDtoH_v2", _pointer(array), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise RuntimeFault(f"CUDA driver: {name} failed with error {status}")


class TensorRTSession(Session):
    """A deserialized engine and the context it runs in."""

    def __init__(self, engine: Any, nptype: Any, driver: Driver, artifact: Artifact) -> None:
        self._engine, self._nptype, self._driver = engine, nptype, driver
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if set(names) != {*self.inputs, *self.outputs}:
            wanted = ", ".join((*self.inputs, *self.outputs))
            raise RuntimeFault(f"the engine has inputs and outputs {', '.join(names)}; expected {wanted}")
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RuntimeFault("TensorRT could not create an execution context", fix="free GPU memory and try again")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        with self._placed(feeds) as addresses:
            self._execute()
            results = {name: np.empty(self._shape(name), self._dtype(name)) for name in self.outputs}
            for name, array in results.items():
                self._driver.download(array, addresses[name])
        return dict(results)

    @contextlib.contextmanager
    def prepared(self, feeds: Mapping[str, Array]) -> Iterator[Callable[[], object]]:
        """Runs the network and waits for it: the feeds are on the GPU already, and the outputs stay there."""
        with self._placed(feeds):
            yield self._execute

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._driver.stream):
            raise RuntimeFault("TensorRT failed to run the engine")
        self._driver.synchronize()

    @contextlib.contextmanager
    def _placed(self, feeds: Mapping[str, Array]) -> Iterator[Mapping[str, int]]:
        """{input or output: its memory on the GPU}, the feeds in it; all of it is freed at the end."""
        self.check(feeds)
        addresses: dict[str, int] = {}

        def place(name: str, size: int) -> int:
            addresses[name] = self._driver.allocate(size)
            self._context.set_tensor_address(name, addresses[name])
            return addresses[name]

        try:
            for name in self.inputs:
                array = np.ascontiguousarray(feeds[name])
                if array.dtype != self._dtype(name):
                    raise RuntimeFault(f"input {name} is {array.dtype}, the engine takes {self._dtype(name)}")
                if not self._context.set_input_shape(name, array.shape):
                    low, _, high = (list(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
                    shape = list(array.shape)
                    raise RuntimeFault(f"input {name} has shape {shape}; the engine takes {low} to {high}")
                self._driver.upload(place(name, array.nbytes), array)
            for name in self.outputs:
                place(name, prod(self._shape(name)) * self._dtype(name).itemsize)
            yield addresses
        finally:
            for address in addresses.values():
                self._driver.free(address)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise RuntimeFault(f"the shape of output {name} depends on data, which is not supported")
        return shape

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._nptype(self._engine.get_tensor_dtype(name)))
        return dtype


@dataclasses.dataclass(frozen=True)
class TensorRT(Runtime):
    """TensorRT of one flavor; an engine runs on the flavor and version that built it."""

    flavor: Literal["tensorrt", "rtx"] = "tensorrt"
    device: int = 0

    def load(self, artifact: Artifact) -> TensorRTSession:
        """A session on `artifact.model`. Raises RuntimeFault without the library, a driver or a GPU that fits."""
        module = MODULES[self.flavor]
        try:
            engine_library = importlib.import_module(module)
        except ImportError as error:
            extra = "trt-rtx" if self.flavor == "rtx" else "trt"
            raise RuntimeFault(f"{module} is not installed", fix=f"pip install 'qexport[{extra}]'") from error
        driver = Driver(self.device)
        errors: list[str] = []
        engine = engine_library.Runtime(_logger(engine_library, errors)).deserialize_cuda_engine(
            artifact.model.read_bytes()
        )
        if engine is None:
            reason = errors[0] if errors else "no reason given"
            raise RuntimeFault(
                f"{module} cannot load {artifact.model.name}: {reason}",
                fix="name the flavor that built it, or rebuild it here with `qexport build`",
            )
        return TensorRTSession(engine, engine_library.nptype, driver, artifact)


def _logger(library: Any, errors: list[str]) -> Any:
    """A logger that keeps errors instead of printing them."""

    class Log(library.ILogger):  # type: ignore[misc]  # the base class comes with the library
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                errors.append(message)

    return Log()


def _pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

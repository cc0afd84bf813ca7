"""PTX on the GPU of this machine through the CUDA driver, in torch's context and on torch's stream and tensors."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.gpu_kernels import GpuKernel, ceil_div


class DriverError(RuntimeError):
    """The driver refused a call."""


class LoadedKernel:
    """A kernel that the driver compiled for this GPU. Raises DriverError with the driver's words when it does not."""

    def __init__(self, kernel: GpuKernel, ptx: bytes) -> None:
        torch.zeros(1, device="cuda")  # makes torch's context the current one
        self.kernel = kernel
        self._driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx)))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, kernel.entry.encode()))

    def __call__(self, inputs: Sequence[Tensor], rows: int, out: int, output: Tensor) -> None:
        """Puts one launch on torch's current stream; `inputs` in the kernel's order."""
        launch = self.kernel.launch(rows, out, ceil_div)
        sizes = {"rows": rows, "out": out, "columns": self.kernel.columns}
        values: list[ctypes.c_void_p | ctypes.c_int] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs]
        values += [ctypes.c_int(sizes[name]) for name in self.kernel.sizes]
        values.append(ctypes.c_void_p(output.data_ptr()))
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*launch.grid, launch.block, 1, 1, launch.shared_mem)
        self._check(self._driver.cuLaunchKernel(self._function, *shape, stream, parameters, None))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{self.kernel.entry}: {(text.value or b'unknown').decode()}")


def memory_bandwidth() -> float:
    """Bytes per second that the memory of the current GPU can move: two transfers a clock over its bus."""
    driver, values = ctypes.CDLL("libcuda.so.1"), []
    for attribute in (36, 37):  # CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE in kHz, _GLOBAL_MEMORY_BUS_WIDTH in bits
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, torch.cuda.current_device())
        values.append(value.value)
    return 2 * values[0] * 1e3 * values[1] / 8

"""The GPU kernels on a GPU: PTX through the driver, every case that the CPU runs, and the same bytes twice."""

import numpy as np
import pytest
import torch

from exporter.gpu_kernels import GpuKernel
from tests.exporter.formats import test_codebook_kernels, test_int3_kernels
from tests.exporter.formats.kernel_problems import Array, Problem
from tools.cuda_driver import LoadedKernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch that uses it"),
]


def on_gpu(array: Array) -> torch.Tensor:
    """The bytes of an array; a kernel knows their type."""
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).cuda()


def run(kernel: GpuKernel, problem: Problem) -> Array:
    output = problem.output(kernel)
    made = on_gpu(output)
    inputs = [on_gpu(problem.arrays[name]) for name in kernel.inputs]
    LoadedKernel(kernel, kernel.ptx())(inputs, problem.sizes["rows"], problem.sizes["out"], made)
    torch.cuda.synchronize()
    return made.cpu().numpy().view(output.dtype).reshape(output.shape)


def check(kernels: tuple[GpuKernel, ...], problem: Problem) -> None:
    for kernel in kernels:
        made, again = run(kernel, problem), run(kernel, problem)
        problem.check(kernel, made, sum_unit=2.0**-23)
        assert made.tobytes() == again.tobytes()


@pytest.mark.parametrize("case", test_int3_kernels.CASES.values(), ids=test_int3_kernels.CASES)
def test_int3(case: test_int3_kernels.Case) -> None:
    for shape in case.shapes:
        check(case.kernels(shape[2]), case.problem(*shape))


@pytest.mark.parametrize("case", test_codebook_kernels.CASES.values(), ids=test_codebook_kernels.CASES)
def test_codebooks(case: test_codebook_kernels.Case) -> None:
    for shape in case.shapes:
        check(case.kernels(shape[2]), case.problem(*shape))

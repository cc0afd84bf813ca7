"""3-bit GPU kernels, run on the CPU from their own source."""

import dataclasses

import numpy as np
import pytest
import torch

from exporter.formats.int3_hqq import pack_codes
from exporter.gpu_kernels import Dtype, GpuKernel, int3_kernels
from tests.exporter.formats.cuda_host import build, needs_compiler, run
from tests.exporter.formats.kernel_problems import Problem, int3_problem
from tests.exporter.formats.kernel_problems import pack_codes as words_of


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to compile the kernels and the shapes (rows, out, columns) to run them on."""

    dtype: Dtype
    group: int
    gemv_rows: int
    tile_rows: int
    shapes: tuple[tuple[int, int, int], ...]
    quant_scale: bool = False
    quant_zero: bool = False
    bias: bool = False

    def kernels(self, columns: int) -> tuple[GpuKernel, ...]:
        found = int3_kernels(
            self.dtype,
            columns,
            self.group,
            bias=self.bias,
            quant_scale=self.quant_scale,
            quant_zero=self.quant_zero,
        )
        wanted = (("ROWS", self.gemv_rows), ("TILE_ROWS", self.tile_rows))
        return tuple(kernel for kernel in found if any(pair in kernel.defines for pair in wanted))

    def problem(self, rows: int, out: int, columns: int) -> Problem:
        meta = {"quant_scale": self.quant_scale, "quant_zero": self.quant_zero}
        return int3_problem(self.dtype, rows, out, columns, self.group, bias=self.bias, **meta)


CASES = {
    "one row, groups of 64": Case("float16", 64, 1, 32, ((1, 90, 320), (9, 41, 64)), bias=True),
    "one row, groups of 128": Case("bfloat16", 128, 1, 64, ((1, 33, 384), (3, 10, 128), (17, 7, 128))),
    "two rows, per channel": Case("float16", 200, 2, 64, ((2, 30, 200), (33, 85, 200))),
    "four rows, odd columns": Case("float16", 21, 4, 32, ((3, 47, 105), (4, 11, 105), (5, 47, 105)), bias=True),
    "four rows, groups across tiles": Case("bfloat16", 24, 4, 64, ((7, 101, 168),), bias=True),
    "eight rows, bytes of meta": Case(
        "bfloat16", 64, 8, 64, ((8, 45, 192), (6, 85, 64), (128, 12, 128)), quant_scale=True, quant_zero=True
    ),
    "bytes of meta for zeros": Case("float16", 32, 8, 32, ((7, 90, 96), (33, 9, 32)), quant_zero=True, bias=True),
    "bytes of meta for scales": Case("float16", 16, 2, 64, ((2, 23, 80),), quant_scale=True),
    "smallest groups, more than are staged": Case("float16", 4, 1, 32, ((1, 13, 548),)),
}


def test_the_words_are_those_of_the_format() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (23, 12), dtype=np.uint8)
    assert np.array_equal(words_of(codes), pack_codes(torch.from_numpy(codes)).numpy())


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_multiplies_by_what_the_words_stand_for(case: Case) -> None:
    for shape in case.shapes:
        problem, kernels = case.problem(*shape), case.kernels(shape[2])
        library = build(kernels)
        for kernel in kernels:
            made = run(library, kernel, problem.arrays, problem.sizes, problem.output(kernel))
            problem.check(kernel, made)
